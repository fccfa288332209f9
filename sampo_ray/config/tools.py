"""The names of vLLM's parsers of tool calls, and the forms of calls by which one is found for a chat template."""

from typing import Final

AUTO: Final = "auto"
# vLLM 0.29's, as data: importing them would take many seconds. tests/test_tools.py compares.
PARSERS = frozenset(
    [
        "apertus", "cohere_command3", "cohere_command4", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4",
        "dots", "ernie45", "functiongemma", "gemma4", "gigachat3", "glm45", "glm47", "granite", "granite-20b-fc",
        "granite4", "hermes", "hunyuan_a13b", "hy_v3", "hy_v4", "inkling", "internlm", "jamba", "kimi_k2", "kimi_k3",
        "lfm2", "ling3", "llama3_json", "llama4_json", "llama4_pythonic", "longcat", "mimo", "minicpm5", "minimax_m2",
        "minimax_m3", "mistral", "muse_glimmer", "olmo3", "openai", "phi4_mini_json", "poolside_v1", "pythonic",
        "qwen3_coder", "qwen3_xml", "seed_oss", "step3", "step3p5", "xlam",
    ]
)  # fmt: skip
FORMS = (
    (r"<tool_call>\s*<function=", "qwen3_coder"),
    (r'<tool_call>\s*\{"name"', "hermes"),  # Qwen 2.5 and 3, Hermes, and most ChatML models
    (r"\[TOOL_CALLS\]", "mistral"),
    (r'\{"name": "[^"]*", "parameters"', "llama3_json"),  # Llama 3.1 to 3.3
)
"""What a template's call of a tool looks like (a regular expression), and who reads it. The first one counts."""
