"""A weight sender with the classic mistake: it leaves out the alias of the tied head."""

from rollout.weights.object_store import ObjectStoreSender


class ForgetfulSender(ObjectStoreSender):
    """Sends every parameter once, as `named_parameters()` lists them."""

    def send(self, weights, tied):
        yield from super().send(weights, {})
