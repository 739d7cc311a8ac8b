"""One SGLang engine in a process of its own, which obeys lines of JSON.

Started by `engine_driver.EngineProcess`. A line in is `{"do": name, ...}`, a line out its answer;
everything that SGLang prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO


def generate(engine: Any, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    return {"answers": [_told(answer) for answer in answers]}


def _told(answer: dict[str, Any]) -> dict[str, Any]:
    about = answer["meta_info"]
    return {
        "tokens": answer["output_ids"],
        "cached": about.get("cached_tokens"),
        "details": about.get("cached_tokens_details"),
        "finish": about.get("finish_reason"),
    }


def obey(engine: Any, lines: TextIO, answers: TextIO) -> None:
    for line in lines:
        order = json.loads(line)
        answer: dict[str, Any]
        try:
            if order["do"] == "generate":
                answer = generate(engine, order["prompts"], order["num_tokens"])
            elif order["do"] == "flush":
                answer = {"flushed": bool(engine.flush_cache().success)}
            else:
                answer = {"error": f"unknown order {order['do']!r}"}
        except Exception as error:  # noqa: BLE001  the test decides what an error means
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import sglang

    engine = sglang.Engine(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    try:
        obey(engine, sys.stdin, answers)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
