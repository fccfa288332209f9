"""The verifiers of lm-evaluation-harness' task ifeval, and of the package ifbench where it is installed, in a process
of their own: some are regular expressions that come from data, which `re` may never finish."""

import functools
import importlib.util

from sampo_ray.rewards.apart import answer_requests

PACKAGES = ("lm_eval", "langdetect", "nltk", "immutabledict")
Values = dict[str, object]
Unknown = dict[str, str]


def verify(request: tuple[list[str], list[Values], str, str, bool]) -> list[bool] | Unknown | str:
    """Which instructions are followed: of names, their values, the prompt, the answer, and whether it is read strictly.
    Instructions that cannot be verified are named in a dictionary; a text says why none can."""
    if problem := prepare():
        return problem
    from lm_eval.tasks.ifeval import utils
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    names, values, prompt, answer, strict = request
    if len(names) != len(values):
        return {"unknown": f"{len(names)} instructions with {len(values)} kwargs"}
    for name, given in zip(names, values, strict=True):
        if name not in INSTRUCTION_DICT:
            return {"unknown": str(name)}
        had = {key for key, value in given.items() if value}  # the harness leaves out the others, and makes values up
        if absent := {*INSTRUCTION_DICT[name](name).get_instruction_args_keys()} - had:
            return {"unknown": f"{name} without {', '.join(sorted(absent))}"}
    asked = utils.InputExample(0, names, prompt, values)
    check = utils.test_instruction_following_strict if strict else utils.test_instruction_following_loose
    try:
        return [bool(each) for each in check(asked, answer).follow_instruction_list]
    except Exception as error:  # of any kind: values from data reach `re`, numbers and names of parameters
        return {"unknown": f"{', '.join(names)}: {type(error).__name__}"}


def seed_language_detection() -> None:
    """Else what langdetect says of short texts differs from call to call."""
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0


@functools.cache
def prepare() -> str | None:
    """Imports the verifiers, and returns what stands against that, in words."""
    if absent := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        return f"verifiable instructions need {', '.join(absent)}; install sampo-ray[eval]"
    import langdetect
    import nltk

    seed_language_detection()
    langdetect.detect("It reads its tables when it is first called.")
    try:
        nltk.data.find("tokenizers/punkt_tab")  # which the harness would download while it is imported
    except LookupError:
        return (
            "verifiable instructions need NLTK's punkt_tab; install it with `python -m nltk.downloader punkt_tab`, or "
            "name the folder that has it in NLTK_DATA"
        )
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    if importlib.util.find_spec("ifbench") is not None:  # whose verifiers have the same form, and other names
        from ifbench import instructions_registry

        for name, verifier in instructions_registry.INSTRUCTION_DICT.items():
            INSTRUCTION_DICT.setdefault(name, verifier)
    return None


if __name__ == "__main__":
    answer_requests(verify, prepare)
