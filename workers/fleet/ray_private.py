"""The two private parts of Ray that a fleet uses. Each has a fallback where Ray has changed it.

- `ray._private.state.available_resources_per_node`: the free resources of every node. Ray's public
  `ray.available_resources` has only their sum, and a run must fit on one node.
- `ray._private.ray_logging.global_worker_stdstream_dispatcher`: the lines that worker processes
  print, before Ray puts a prefix of its own in front of them.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray

_log = logging.getLogger(__name__)

FreeByNode = Callable[[], Mapping[str, Mapping[str, float]]]
Batch = Mapping[str, Any]


def find_free_by_node() -> FreeByNode | None:
    """Return Ray's function for the free resources of every node; None if it is not the known one.

    Without it a fleet counts only its own runs. Where others use the cluster too, its runs then
    wait in Ray's queue and are given back, which is slower and fails none of them.
    """
    found = _find("ray._private.state", "available_resources_per_node")
    if found is not None and _parameters(found) == []:
        return found
    _warn("available_resources_per_node", "this fleet does not see what others use of the cluster")
    return None


def forward_worker_lines(forward: Callable[[Batch], None]) -> None:
    """Call `forward` with the lines of worker processes, instead of Ray's own printing of them.

    Without this part of Ray, Ray goes on printing the lines, with a prefix in front of each.
    """
    dispatcher = _find("ray._private.ray_logging", "global_worker_stdstream_dispatcher")
    remove = getattr(dispatcher, "remove_handler", None)
    add = getattr(dispatcher, "add_handler", None)
    if _parameters(remove) == ["name"] and _parameters(add) == ["name", "handler"]:
        assert remove is not None
        assert add is not None
        remove("ray_print_logs")
        add("warmscale", forward)
    else:
        _warn("global_worker_stdstream_dispatcher", "Ray prints workers' lines with its own prefix")


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _parameters(function: Any) -> list[str] | None:
    """Return the names of a function's parameters; None if it is not callable."""
    return [*inspect.signature(function).parameters] if callable(function) else None


def _warn(name: str, effect: str) -> None:
    works = "pip install 'ray[train]==2.60.*'"
    more = {"part": name, "found": ray.__version__, "effect": effect, "works": works}
    _log.warning("this Ray has other private parts", extra=more)
