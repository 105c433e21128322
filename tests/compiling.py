"""XLA told to compile small programs quickly rather than well, here and in processes of tests."""

import os

import jax
from jax._src import compiler

# XLA's older way to emit fusions takes half the time; newer releases no longer have it.
_OLD_EMITTERS = jax.__version_info__ < (0, 11)


def use_old_emitters(monkeypatch):
    """From now on in this process, until the patch is undone.

    Two programs that say the same may then differ by a rounding where they else would not.
    """
    if _OLD_EMITTERS:
        options_of = compiler.get_compile_options

        def with_old_emitters(*args, env_options_overrides=None, **kwargs):
            overrides = {**(env_options_overrides or {}), "xla_cpu_use_fusion_emitters": False}
            return options_of(*args, env_options_overrides=overrides, **kwargs)

        monkeypatch.setattr(compiler, "get_compile_options", with_old_emitters)


def quick_environment():
    """The variables of a process that is quick from its start."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _OLD_EMITTERS:
        flags += " --xla_cpu_use_fusion_emitters=false"
    return {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags.strip()}
