"""What this version builds of the schema. A later feature removes its line here."""

from gkd.config.schema import Config
from gkd.errors import NotBuiltYet


def refuse_unbuilt(config: Config) -> None:
    """Refuse values that the schema reserves and nothing implements.

    Raises:
        NotBuiltYet: for the first such value.
    """
    rollout = config.rollout
    unbuilt: list[tuple[str, object, bool, str]] = [
        ("rollout.max_restarts", rollout.max_restarts, rollout.max_restarts > 0, "Use 0."),
        ("log.wandb", config.log.wandb, config.log.wandb, "Read metrics.jsonl."),
    ]
    for at, teacher in zip(config.teacher_fields, config.all_teachers, strict=True):
        unbuilt.append((f"{at}.signal", teacher.signal, teacher.signal == "attention_relations", "Use auto."))
    for field, value, refused, cure in unbuilt:
        if refused:
            raise NotBuiltYet(field, value, cure)
