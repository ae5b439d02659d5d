"""Save a flow or a guide, and load it without the code that built it.

The file is torch's, with {format, spec, state}: the number of the format, the description of the object as plain data,
and its tensors.  Reading it runs only code of pyro_flows, and its cost depends on the file's size alone.
"""

from __future__ import annotations

import os
import threading
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn, serialization

from ..arguments import as_file
from ..atomic_files import save_tensors, write_atomically
from ..flows import Dequantized, Flow, Mixed
from ..guides import AutoFlow, AutoPlateFlow, AutoStructuredFlow
from .allowed_classes import BY_TYPE, ROOTS
from .module_state import check_comes_back, marks_of, restore, state_of
from .safe_archive import Archive, Damaged, Foreign
from .size_limit import FREE_NUMBER, Allowance
from .spec import WAY_OUT, build, describe, named

FORMAT = 1
SPEC = ["class", "arguments", "frozen", "dtypes", "training"]  # the parts of a spec
Guide = AutoFlow | AutoPlateFlow | AutoStructuredFlow
_settings_of_torch = threading.Lock()  # torch has one setting for all threads


def save(flow_or_guide: Flow | Dequantized | Mixed | Guide, path: str | os.PathLike[str]) -> None:
    """Write a flow or a guide to a file, from which :func:`load` restores it without the code that built it.

    A guide is saved without its model; after loading it draws and scores latents.  A flow keeps its dtypes, its frozen
    parameters, its shared layers and its mode, training or evaluation.  It comes back on the CPU.

    The file is complete or absent.  It holds classes of pyro_flows by name.  Your own networks, transforms and
    bijectors are refused, also if they inherit from ours, and so is a function as encoder.  Activations must be classes
    of ``torch.nn``.  The distribution of a ``FixedBase`` may be ``Normal``, ``Laplace``, ``StudentT``, ``Cauchy``,
    ``Gumbel``, ``Uniform`` or ``MultivariateNormal``, with ``to_event``.

    Args:
        flow_or_guide: A ``Flow``, ``Dequantized`` or ``Mixed`` flow, or an ``AutoFlow``, ``AutoPlateFlow`` or
            ``AutoStructuredFlow`` that was set up.
        path: The file, which is replaced if it exists: readers and other writers see the old file or the new one.
            A symbolic link stays, and the file that it points to is replaced; its mode is kept.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        OSError: If the file cannot be written, for example because the disk is full; then nothing has changed.
        ValueError: If a part is of a class that files do not hold, if the flow was changed after its construction, or
            if the guide was never set up.

    Example::

        >>> import tempfile, torch
        >>> from pyro_flows import flows
        >>> flow = flows.nsf(3, context_dim=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(flow, f"{folder}/flow.pt")
        ...     again = load(f"{folder}/flow.pt")
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> torch.equal(again(context).log_prob(x), flow(context).log_prob(x))
        True
    """
    file = as_file("save", "path", path)
    kind = BY_TYPE.get(type(flow_or_guide))
    if kind is None or kind.name not in ROOTS:
        raise ValueError(
            f"save: flow_or_guide is {named(flow_or_guide)}, but must be a Flow, a Dequantized or Mixed flow, an "
            f"AutoFlow, an AutoPlateFlow or an AutoStructuredFlow, exactly. {WAY_OUT}"
        )
    spec = describe(flow_or_guide)
    parts = kind.arguments(flow_or_guide) if not issubclass(kind.type, Flow) else {"the flow": flow_or_guide}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            check_comes_back(name, part)
    content = {"format": FORMAT, "spec": {**spec, **marks_of(flow_or_guide)}, "state": state_of(flow_or_guide)}
    write_atomically(file, lambda draft: _write(content, draft))


def load(path: str | os.PathLike[str]) -> Any:
    """Load the flow or the guide in a file of :func:`save`, on the CPU; move it by ``.to(device)``.

    A guide comes back without its model.  ``guide.sample(n)``, ``log_prob(values)``, ``median()`` and ``quantiles(q)``
    need neither model nor data.  With an encoder they take the model's arguments, by position or by name.
    With a model the guide can be checked and trained further: ``pf.psis(model, guide, *args)``.

    The file may come from an untrusted source.  Nothing in it is run, and it takes time and memory in proportion to its
    size: a small file that asks for large tensors is refused.

    Args:
        path: The file.

    Returns:
        A ``Flow``, a ``Dequantized`` or ``Mixed`` flow, or one of the guides.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file of :func:`save`, is damaged, was written by a newer pyro_flows, or claims more
            than it holds.

    Example::

        >>> import pyro, pyro.distributions as dist, tempfile
        >>> from pyro_flows import AutoFlow
        >>> def model():
        ...     pyro.sample("rate", dist.Gamma(2.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(AutoFlow(model).setup(), f"{folder}/guide.pt")
        ...     guide = load(f"{folder}/guide.pt")
        >>> guide.sample(100)["rate"].min() > 0
        tensor(True)
    """
    path = as_file("load", "path", path)
    spec, state, archive = _read(path)
    try:
        if list(spec) not in (SPEC, SPEC[:-1]):  # the first files of this format have no modes of training
            raise ValueError(f"its spec has the parts {list(spec)!r:.100}")
        if spec["class"] not in ROOTS:
            raise ValueError(f"it is of a class {spec['class']!r:.60}, which is neither a flow nor a guide")
        whole = {name: spec[name] for name in ("class", "arguments")}
        with Allowance(archive.nbytes, archive.tensors, archive.squares):
            made = build(whole, limit=max(FREE_NUMBER, archive.nbytes))
        restore(made, state, frozen=spec["frozen"], dtypes=spec["dtypes"], training=spec.get("training", {}))
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.partition("Trace Shapes:")[0].split()).rstrip(".")
        words = f"cannot be restored: {reason:.400}. Save it anew, from where the flow or guide still is."
        raise _refused(path, words) from error
    return made


def _write(content: dict[str, Any], draft: str) -> None:
    # Checksums show damage.  torch before 2.6 always writes them, and has no option.
    with _settings_of_torch, ExitStack() as stack:
        if hasattr(serialization, "set_crc32_options"):
            stack.callback(serialization.set_crc32_options, serialization.get_crc32_options())
            serialization.set_crc32_options(True)
        save_tensors(content, draft)


def _refused(path: Path, words: str) -> ValueError:
    return ValueError(f"load: {str(path)!r} {words}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Archive]:
    """Return the spec and the state in a file, and all its content.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no file {str(path)!r}.")
    with path.open("rb") as file:
        try:
            archive = Archive(file)
        except Exception as error:
            raise _refused(path, _fault(error)) from error
    content = archive.content
    spec, state = (content.get(key) if isinstance(content, dict) else None for key in ("spec", "state"))
    if not isinstance(spec, dict) or not isinstance(state, dict) or type(content.get("format")) is not int:
        raise _refused(path, f"is not a file of pyro_flows.save: {_kind_of(content)}.")
    if (number := content["format"]) != FORMAT:
        words = f"has the format {number}, and this pyro_flows reads format {FORMAT}. If a newer one wrote it, update."
        raise _refused(path, words)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise _refused(path, "was changed: its state holds something other than tensors. Save it anew.")
    return spec, state, archive


def _fault(error: Exception) -> str:
    """Return what is wrong with a file that cannot be read, and what to do about it."""
    if isinstance(error, Damaged):
        return f"is damaged (in its part {str(error)!r:.100}). Copy it again or save it anew."
    if isinstance(error, zipfile.BadZipFile):
        return f"is not a file of pyro_flows.save, or was cut off ({error!s:.100}). Copy it again or save it anew."
    if isinstance(error, Foreign):
        words = "it holds more than plain data and tensors, and nothing of it was run. Read it with what wrote it."
        return f"is not a file of pyro_flows.save: {words}"
    return f"is not a file of pyro_flows.save, nor any of torch.save ({error!s:.200})."


def _kind_of(content: Any) -> str:
    """Return what a file of torch holds instead of a flow, and what to do with it."""
    if isinstance(content, dict) and "settings" in content:
        return "it is a checkpoint of an unfinished fit; give it to the fit as checkpoint="
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return "it holds only tensors, as a state_dict does; load them into a flow that you build, by load_state_dict"
    return f"it holds a {type(content).__name__} without format, spec and state"
