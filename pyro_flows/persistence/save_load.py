"""Save a flow, a guide or a posterior, and load it without the code that built it.

The file is one of safetensors, which holds tensors by name.  Its metadata hold the description of the object, in JSON,
and a checksum.  Reading it runs only code of pyro_flows, and its cost depends on the file's size alone.
"""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..arguments import as_file
from ..atomic_files import write_atomically
from ..flows import Dequantized, Flow, Mixed
from .allowance import Allowance
from .classes import BY_NAME, BY_TYPE, has_parts
from .packing import WAY_OUT, check_comes_back, checksum, named, pack, unpack

FORMAT = 2


def save(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a flow, a guide or a posterior to a file, from which :func:`load` restores it without your code.

    A guide is saved without its model; after loading it draws and scores latents.  A flow keeps its dtypes, its frozen
    parameters, its shared layers and its mode, training or evaluation.  It comes back on the CPU.  A posterior keeps
    its draws, its facts and its guide.

    The file is complete or absent.  ``safetensors.torch.load_file`` reads its tensors too.  It holds classes of
    pyro_flows by name.  Your own networks, transforms and bijectors are refused, also if they inherit from ours, and so
    is a function as encoder.  Activations must be classes of ``torch.nn``.  The distribution of a ``FixedBase`` may be
    ``Normal``, ``Laplace``, ``StudentT``, ``Cauchy``, ``Gumbel``, ``Uniform`` or ``MultivariateNormal``, with
    ``to_event``.

    Args:
        value: A ``Flow``, ``Dequantized`` or ``Mixed`` flow, or an ``AutoFlow``, ``AutoPlateFlow`` or
            ``AutoStructuredFlow`` that was set up, or a ``Posterior``.
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
    if not _is_whole(kind := type(value)) or kind not in BY_TYPE:
        raise ValueError(
            f"save: value is {named(value)}, but must be a Flow, a Dequantized or Mixed flow, an "
            f"AutoFlow, an AutoPlateFlow, an AutoStructuredFlow or a Posterior, exactly. {WAY_OUT}"
        )
    content, tensors = pack(value)
    check_comes_back("the flow", value)
    spec = json.dumps({"format": FORMAT, **content})
    about = {"format": "pt", "pyro_flows": spec, "crc32": checksum(spec, tensors)}
    data = safetensors.torch.save(tensors, about)
    write_atomically(file, lambda draft: Path(draft).write_bytes(data))


def load(path: str | os.PathLike[str]) -> Any:
    """Load what :func:`save` has written, on the CPU; move it by ``.to(device)``.

    A guide comes back without its model.  ``guide.sample(n)``, ``log_prob(values)``, ``median()`` and ``quantiles(q)``
    need neither model nor data.  With an encoder they take the model's arguments, by position or by name.
    With a model the guide can be checked and trained further: ``pf.psis(model, guide, *args)``.

    The file may come from an untrusted source.  Nothing in it is run, and it takes time and memory in proportion to its
    size: a small file that asks for large tensors is refused.

    Args:
        path: The file.

    Returns:
        A ``Flow``, a ``Dequantized`` or ``Mixed`` flow, one of the guides, or a ``Posterior``.

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
    text, tensors = _read(path)
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"it has the format {content['format']!r:.20}, and this pyro_flows reads format {FORMAT}")
        if not _is_whole(BY_NAME.get(content["class"], object)):
            raise ValueError(f"it is of a class {content['class']!r:.60}, which is no flow, guide or posterior")
        allowance = Allowance(tensors.values())
        with allowance:
            made = unpack(content, tensors, limit=max(2**20, allowance.held))
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.partition("Trace Shapes:")[0].split()).rstrip(".")
        words = f"cannot be restored: {reason:.400}. Save it anew, from where it still is."
        raise _refused(path, words) from error
    return made


def _is_whole(kind: type) -> bool:
    """True for the classes that a file may hold by themselves."""
    return issubclass(kind, Flow | Dequantized | Mixed) or has_parts(kind)


def _refused(path: Path, words: str) -> ValueError:
    return ValueError(f"load: {str(path)!r} {words}")


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the spec, in JSON, and the tensors in a file.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no file {str(path)!r}.")
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except Exception as error:
        words = f"or was cut off ({error!s:.100}). Copy it again or save it anew."
        if data[:1] in (b"P", b"\x80"):  # of archives and pickles
            words = "but one of torch.save, pickle or NumPy, and nothing of it was run. Read it with what wrote it."
        raise _refused(path, f"is not a file of pyro_flows.save, {words}") from error
    if "pyro_flows" not in about:
        words = "is not a file of pyro_flows.save: it holds only tensors. Load them by load_state_dict."
        raise _refused(path, words)
    if about.get("crc32") != checksum(about["pyro_flows"], tensors):
        raise _refused(path, "is damaged, or was changed. Copy it again or save it anew.")
    return about["pyro_flows"], tensors
