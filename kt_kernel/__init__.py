"""CPU experts for Mixture-of-Experts models inside stock SGLang.

SGLang imports ``KTMoEWrapper`` (and its fork also ``generate_gpu_experts_masks``) under ``except ImportError``:
importing this package is cheap, prints nothing, and fails with ``ImportError`` only.
"""

from importlib import metadata as _metadata

__version__ = "0.1.0"
__all__ = ["HybridMoE", "KTMoEWrapper", "generate_gpu_experts_masks", "__version__"]


def _refuse_incumbent() -> None:
    # PyPI's kt-kernel installs a package folder of the same name: the one that came last has overwritten the other.
    try:
        version = _metadata.version("kt-kernel")
    except Exception:  # not there; or what an interrupted uninstall left cannot be read, which is no package either
        return
    if not version:
        return
    raise ImportError(
        f"kt-kernel {version} from PyPI installs the same package folder kt_kernel; run "
        "`pip uninstall -y kt-kernel && pip install --force-reinstall --no-deps <this project>`."
    )


def _load_extension() -> None:
    try:
        from kt_kernel._build_info import TORCH_VERSION
    except ImportError:
        raise ImportError(
            "kt_kernel is not built here: run `pip install .` in its source folder (and do not import it from there)."
        ) from None
    try:
        import torch
    except Exception as error:  # a broken torch must not take down a host that only probes for us
        raise ImportError(f"kt_kernel needs torch {TORCH_VERSION}, which does not import: {error}") from error
    if torch.__version__.split("+")[0] != TORCH_VERSION.split("+")[0]:
        raise ImportError(
            f"kt_kernel was built for torch {TORCH_VERSION} but torch {torch.__version__} is installed; install that "
            "torch, or rebuild with KT_TORCH_VERSION set to the installed one."
        )
    try:
        from kt_kernel import _ext  # noqa: F401  (registers torch.ops.kt_kernel)
    except ImportError:
        raise
    except Exception as error:
        raise ImportError(f"the extension of kt_kernel does not load: {error}") from error


_refuse_incumbent()
_load_extension()

from kt_kernel import ops as _ops  # noqa: E402,F401  (fake implementations)
from kt_kernel.placement import generate_gpu_experts_masks  # noqa: E402
from kt_kernel.wrapper import KTMoEWrapper  # noqa: E402


def __getattr__(name: str) -> object:
    # a program of its own wants it, SGLang does not: imported when it is asked for
    if name == "HybridMoE":
        from kt_kernel.hybrid_moe import HybridMoE

        return HybridMoE
    raise AttributeError(f"module 'kt_kernel' has no attribute {name!r}")
