"""Which layer of the teacher a layer of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence

from aicompress.methods.outputs import OutputShapes


def uniform_map(layers: Sequence[int], student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Pairs (m, g(m)) with g(m) = m L_t / L_s, rounded; layer 0 is the input of the first layer.

    Jiao et al., "TinyBERT", 2020, section 3.1 (uniform strategy).

    Args:
        layers: layers of the student; none means 1 to `student_depth`.
        student_depth, teacher_depth: L_s and L_t.
    """
    chosen = layers or range(1, student_depth + 1)
    return [(m, (2 * m * teacher_depth + student_depth) // (2 * student_depth)) for m in chosen]


def check_layers(student: OutputShapes, teacher: OutputShapes, layers: Sequence[int]) -> tuple[str, str] | None:
    """What keeps the layers of two models from being compared, as (message, hint), or None."""
    if student.depth is None or teacher.depth is None:
        which = "student" if student.depth is None else "teacher"
        return f"the {which} gives no hidden states", "distil logits by kl or mse"
    outside = [layer for layer in layers if layer > student.depth]
    if outside:
        return (
            f"layer {outside[0]} is asked for, the student has {student.depth}",
            "layers count from 1; 0 is the input",
        )
    return None
