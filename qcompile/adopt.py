"""Make ``torch.compile(model, backend="qcompile")`` mean what it says for transformers models.

Three things that torch.compile leaves to its user, done for modules that are compiled with this backend only:

* ``compiled.generate`` is a method of the original model, so that stock torch runs it uncompiled, without a word.
  Here the original model's calls run the compiled forward while ``generate`` is running.
* Sequence length and batch size are dynamic from the first call on (unless ``dynamic=`` is given), and Python floats
  such as eps are constants: otherwise each new prompt length would first be compiled as a constant.
* Comparisons of versions in the code of float experts are traced without Dynamo's warning about their lru_cache.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


def adopt_compiled_modules(backend: Callable) -> None:
    """Let every OptimizedModule that is made with ``backend`` from now on behave as described above."""
    from torch._dynamo.eval_frame import OptimizedModule

    initialize = OptimizedModule._initialize

    @functools.wraps(initialize)
    def _initialize(self: OptimizedModule) -> None:
        initialize(self)
        if _compiler(self.dynamo_ctx) is backend:
            _dynamic_by_default(self.dynamo_ctx)
            _trust_version_checks()
            if callable(getattr(type(self._orig_mod), "generate", None)):
                self.__dict__["generate"] = functools.partial(_generate_compiled, self)

    OptimizedModule._initialize = _initialize  # type: ignore[method-assign]


def _compiler(context: Any) -> Any:
    """The backend function behind the wrappers that torch.compile puts around it."""
    from torch._dynamo.eval_frame import innermost_backend

    compiler = innermost_backend(context.callback) if callable(context.callback) else None
    return getattr(compiler, "compiler_fn", compiler)


def _dynamic_by_default(context: Any) -> None:
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as shapes

    # cached lengths, batch modes and masks each have a graph of their own; eight, the default limit, is soon reached
    settings: dict[str, Any] = {"specialize_float": True, "recompile_limit": 64}
    if context._dynamic is None:
        settings["assume_static_by_default"] = False
        # a batch of 2 on a model with 2 heads must not tie the one size to the other
        context.enter_exit_hooks.append(shapes._make_closure_patcher(use_duck_shape=False))  # type: ignore[attr-defined]
    context.enter_exit_hooks.append(dynamo._make_closure_patcher(**settings))


def _trust_version_checks() -> None:
    """What transformers says about the version of torch is constant; older versions of torch cannot be told so."""
    import torch._dynamo.utils as dynamo

    allow = getattr(dynamo, "allow_lru_cache_wrapper_trace_without_warning", None)
    versions = sys.modules.get("transformers.utils.import_utils")
    if allow is None or versions is None:
        return
    for name in ("is_torch_less_or_equal", "is_torch_greater_or_equal"):
        if check := getattr(versions, name, None):
            allow(check)


def _generate_compiled(compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the original model, with its forward compiled; nested calls keep the outermost setting."""
    model = compiled._orig_mod
    before = model._compiled_call_impl
    model._compiled_call_impl = before or compiled.dynamo_ctx(model._call_impl)
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        model._compiled_call_impl = before
