"""What `gkd plan` is asked, beside the config."""

from dataclasses import dataclass
from pathlib import Path

from gkd.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Rates are response tokens per second and device."""

    run: Path | None = None
    """A finished run that rates are taken from."""
    devices: int | None = None
    """How many there are to split."""
    device_memory_gib: float | None = None
    """Of each; None: not compared."""
    rollout_tokens_per_s: float | None = None
    """Of an engine."""
    teacher_tokens_per_s: float | None = None
    """Of a teacher."""
    train_tokens_per_s: float | None = None
    """Of a training rank."""
    sync_bytes_per_s: float | None = None
    """Of the wire to each engine."""
    peak_tflops: float | None = None
    """10^12 operations per second of a device."""
    utilisation: float | None = None
    """Share of them that teachers and trainer reach."""
    rollout_utilisation: float | None = None
    """Share of them that engines reach; None: the same."""
    prompt_tokens: float | None = None
    """Mean; None: as the data have it."""
    response_tokens: float | None = None
    """Mean; None: as in the run, or as long as they may be."""
    on_cpu: bool = False
    """Whether workers are processes of a host without GPUs."""

    def check(self) -> None:
        """Numbers that are given have to be above 0, shares at most 1, and what needs another has it.

        Raises:
            UserError: for the first that is not so.
        """
        for name in PlanRequest.__dataclass_fields__:
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < float("inf"):
                raise UserError(option, value, "is no number above 0.", "Give one, or leave the option out.")
            if name.endswith("utilisation") and value is not None and value > 1:
                raise UserError(option, value, "is no share.", "Give a number up to 1, such as 0.4.")
        if (self.peak_tflops is None) != (self.utilisation is None):
            options = ("--peak-tflops", "--utilisation")
            given, other = options if self.utilisation is None else options[::-1]
            raise UserError(given, self.peak_tflops or self.utilisation, f"says little without {other}.", "Give both.")
        if self.rollout_utilisation is not None and self.peak_tflops is None:
            raise UserError(
                "--rollout-utilisation", self.rollout_utilisation, "says little without --peak-tflops.", "Give both."
            )
