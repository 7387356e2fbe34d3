"""Self-evolving visual reasoning from unlabeled images (iReasoner, arXiv 2601.05877).

    import ireasoner

    run = ireasoner.train("photos/", "Qwen/Qwen2.5-VL-7B-Instruct", "runs/mine")
    model = ireasoner.TrainedModel.from_run("runs/mine")
    model.ask("photo.jpg", "How many people are there?").answer

What `__all__` names is stable: it changes only with the minor version, and the changelog says how. Everything is
imported when it is first used, so that `import ireasoner` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ireasoner.app.api import resume, train
    from ireasoner.method.answers import answer_key
    from ireasoner.method.recipe import Recipe
    from ireasoner.method.scoring import Context, Group, RewardFunction, ScoredGroup, score_group
    from ireasoner.method.types import Episode, UsageError
    from ireasoner.training.config import Config, load_recipe
    from ireasoner.training.saved import SavedRun, load_run
    from ireasoner.training.state import Observer
    from ireasoner.training.trackers import Tracker
    from ireasoner.training.trained import Answer, TrainedModel

__version__ = "0.2.0"

__all__ = [
    "Answer",
    "Config",
    "Context",
    "Episode",
    "Group",
    "Observer",
    "Recipe",
    "RewardFunction",
    "SavedRun",
    "ScoredGroup",
    "Tracker",
    "TrainedModel",
    "UsageError",
    "__version__",
    "answer_key",
    "load_recipe",
    "load_run",
    "resume",
    "score_group",
    "train",
]

_MODULES = {
    "app.api": ("resume", "train"),
    "method.answers": ("answer_key",),
    "method.recipe": ("Recipe",),
    "method.scoring": ("Context", "Group", "RewardFunction", "ScoredGroup", "score_group"),
    "method.types": ("Episode", "UsageError"),
    "training.config": ("Config", "load_recipe"),
    "training.saved": ("SavedRun", "load_run"),
    "training.state": ("Observer",),
    "training.trackers": ("Tracker",),
    "training.trained": ("Answer", "TrainedModel"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
