"""`aicompress verify`."""

from __future__ import annotations

import dataclasses
import json

from aicompress.cli import options as o

EXAMPLES = """Examples:

aicompress verify w4/"""


def command(source: o.Source, as_json: o.AsJson = False) -> None:
    """Check that a checkpoint is complete: headers, index, digests, finite values, every compressed weight decodes."""
    from aicompress.cli.boundary import resume_collector
    from aicompress.errors import CheckpointError, Unsupported
    from aicompress.pipeline.verify import verify

    resume_collector()
    verification = verify(source)
    if as_json:
        plain = {**dataclasses.asdict(verification), "sound": verification.sound}
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        for line in (*verification.checks, *(f"note: {note}" for note in verification.notes)):
            print(line)
        for problem in verification.problems:
            print(f"problem: {problem}")
    if verification.unread and not verification.problems:
        hint = "`aicompress inspect` lists what it holds; verify the checkpoint that it was made from"
        raise Unsupported(f"{source} cannot be decoded, so it is not judged: {verification.unread}", hint)
    if not verification.sound:
        count = len(verification.problems)
        message = f"{source} is not sound: {count} problem{'s' if count > 1 else ''}"
        raise CheckpointError(message, "download it, or run the step that wrote it, again")
    if not as_json:
        print(f"{source} is sound")
