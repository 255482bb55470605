"""What a test asks of a refused config."""

from contextlib import contextmanager

import pytest

from gkd.errors import UserError


@contextmanager
def refused(field, says, *, alone=False):
    """What is done within ends in an error of this field that says so (in whichever case); `alone`: the only one."""
    with pytest.raises(UserError) as caught:
        yield
    assert caught.value.field == field
    assert says.lower() in str(caught.value).lower()
    assert not alone or "more after this" not in str(caught.value)
