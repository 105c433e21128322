"""The README's example on a plain Flax MLP, as it is printed there, with either optimizer."""

from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("method", ["galore", "lora"])
def test_a_plain_flax_mlp_learns(method):
    section = README.read_text().split("### In your own training loop")[1]
    code = section.split("```python\n")[1].split("```")[0]
    if method == "lora":
        line = next(line for line in code.splitlines() if line.startswith("optimizer = "))
        other = next(line for line in code.splitlines() if line.startswith("# or: "))
        code = code.replace(line, "optimizer = " + other.removeprefix("# or: "))
    names: dict = {"__name__": "example"}
    exec(compile(code, "README.md", "exec"), names)
    start = names["nnx"].to_pure_dict(names["state"])
    before = float(names["loss"](start, names["x"], names["y"]))
    assert float(names["value"]) < before / 3
    assert hasattr(names["opt_state"], "factors") == (method == "lora")
