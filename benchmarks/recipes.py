"""Three stages over five models, beside the three commands that they stand for and a merge of two models.

    python benchmarks/recipes.py [--rounds 5] [--folder DIR]

Makes five full-size models with the project's own generator (kept in --folder, when one is given). Rounds are
in random order, ratios are taken within a round. Files are warm; fsync of the outputs is included. Memory is
the peak of anonymous memory (Linux), beside that of `import torch`.
"""

from __future__ import annotations

import time

from harness import arguments, full_size_pair, measure, report, report_memory

MIX = """
[X]
models = ["{a}", "{b}"]
preset = "high_res"
[Y]
models = ["X", "{c}", "{d}"]
method = "add_difference"
weights = 1
[final]
models = ["Y", "{e}"]
preset = "low_res"
"""
RUN = "import sys; blockmerge.Recipe.load(sys.argv[1]).run(sys.argv[2], overwrite=True)"
VERIFY = "import sys; assert blockmerge.verify(sys.argv[1]).same"
STAGES, COMMANDS, FLAT, CHECKED = "three stages", "three commands", "two models, flat 0.5", "verify"


def main() -> None:
    chosen = arguments(__doc__ or "")
    with full_size_pair(chosen) as (a, b, output):
        import blockmerge
        from blockmerge.demo import write_pair

        folder = a.parent
        c, d, e, spare = (folder / f"{chosen.family}-{name}.safetensors" for name in ("c", "d", "e", "spare"))
        for seed, (one, other) in enumerate([(c, d), (e, spare)], start=1):
            if not one.exists():
                write_pair(one, other, chosen.family, full_size=True, seed=seed, overwrite=True)
        spare.unlink(missing_ok=True)
        mix = folder / "mix.toml"
        mix.write_text(MIX.format(a=a.name, b=b.name, c=c.name, d=d.name, e=e.name))
        x, y, made = (folder / f"{chosen.family}-{name}.safetensors" for name in ("x", "y", "made"))
        blockmerge.Recipe.load(mix).run(made, overwrite=True)

        def commands() -> None:
            blockmerge.merge(a, b, preset="high_res", output=x, overwrite=True)
            blockmerge.merge(x, c, d, method="add_difference", weights=1, output=y, overwrite=True)
            blockmerge.merge(y, e, preset="low_res", output=output, overwrite=True)

        actions = {
            STAGES: lambda: blockmerge.Recipe.load(mix).run(output, overwrite=True),
            COMMANDS: commands,
            FLAT: lambda: blockmerge.merge(a, b, weights=0.5, output=output, overwrite=True),
            CHECKED: lambda: blockmerge.verify(made),
        }
        outputs = (x, y, output)

        def before() -> None:
            for path in outputs:
                path.unlink(missing_ok=True)

        try:
            timed = {name: lambda action=action: _timed(action) for name, action in actions.items()}
            report(measure(timed, chosen.rounds, before), [COMMANDS, FLAT, STAGES])
            report_memory({STAGES: (RUN, (mix, output)), CHECKED: (VERIFY, (made,))})
        finally:
            for path in (*outputs, made, mix):
                path.unlink(missing_ok=True)


def _timed(action: object) -> float:
    started = time.perf_counter()
    action()  # type: ignore[operator]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
