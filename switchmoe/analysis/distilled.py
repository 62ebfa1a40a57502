"""What a student kept of its teacher, in words (`runs.distilling`)."""

from typing import Any


def rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values from a `run.json`; [] of a run without a teacher."""
    found = run.get("distilled")
    if not found:
        return []
    lines = [("Teacher", f"{found['teacher']}, step {run['init']['teacher_step']:,}")]
    lines += [
        (f"{found['figure']} of the {who}", f"{found[f'of_{who}']:.4f}")
        for who in ("baseline", "student", "teacher")
        if found.get(f"of_{who}") is not None
    ]
    counts = [found[f"parameters_of_{who}"] for who in ("student", "teacher")]
    share = f"{found['compression']:.1%} fewer" if found["compression"] >= 0 else "more"
    lines.append(("Parameters of the student", f"{counts[0]:,}, {share} than the teacher's {counts[1]:,}"))
    if found.get("gain_kept") is not None:
        lines.append(("Of the teacher's gain kept", f"{found['gain_kept']:.1%} (Switch, table 6: 30 %)"))
    return lines
