"""The layouts of public preference and prompt data, as data: which names columns have, and what is in them.

Names are compared as `key_of` writes them (lower case, one underscore between words and numbers). Of several names the
first one that a source has counts.
"""

PROMPTS = (
    "prompt", "question", "orig_instruction", "instruction", "query", "problem", "user_prompt", "user_query",
    "user_message", "user_input", "user_instruction", "user_question", "request", "question_body", "question_text",
    "prompt_text", "input_text", "input_prompt", "input", "inputs", "human",
)  # fmt: skip
"""A question as text; some sources have the conversation up to the answer there."""

CONVERSATIONS = (
    "messages", "conversations", "conversation", "dialogue", "dialog", "trajectory", "prompt_messages",
    "input_messages", "turns", "chat", "chat_messages", "conversation_turns", "dialogue_turns",
)  # fmt: skip
"""Turns: a prompt where there is none as text. They may go on with an answer."""

HISTORIES = (
    "history", "context", "chat_history", "conversation_history", "dialogue_history", "message_history",
    "past_messages", "previous_messages", "previous_turns", "past_turns", "context_messages", "conversation_context",
    "dialog_history",
)  # fmt: skip
"""Turns before the prompt; the prompt itself where there is no other."""

CONTEXTS = (
    "context", "contexts", "passage", "passages", "document", "documents", "article", "background", "knowledge",
    "retrieved_context", "retrieved_documents", "reference_text", "source_text", "choices", "options",
)  # fmt: skip
"""Text that a question is about."""

SYSTEMS = (
    "system", "system_prompt", "system_message", "system_instruction", "system_instructions", "system_content",
    "system_text", "sys", "sys_prompt", "system_role", "developer", "developer_prompt", "developer_message",
)  # fmt: skip

SETTINGS = ("chat_template_kwargs", "template_kwargs")
"""What a chat template is given besides: a system prompt of its own, tools."""

TOOLS = (
    "tools", "functions", "available_tools", "tool_definitions", "function_definitions", "tool_schemas", "tool_list",
    "function_list", "tools_json", "available_functions",
)  # fmt: skip

INSTRUCTIONS_WITH_INPUT = ("instruction", "user_instruction")
"""Prompts that go on with an `input`, as Alpaca's; with Dolly's `context`, if that is text."""

INSIDE = (
    "messages", "conversation", "conversations", "full_text", "text", "content", "response", "answer", "completion",
    "output", "generation", "prompt", "question", "value", "message",
)  # fmt: skip
"""Where the text or the turns are in a column that holds an object."""

IMAGES = (
    "image", "images", "image_path", "image_paths", "image_url", "image_urls", "image_file", "image_files", "img",
    "picture", "pictures", "video", "videos", "video_path", "video_url", "audio", "audios", "audio_path", "audio_url",
    "pixel_values", "chosen_image", "chosen_images", "rejected_image", "rejected_images",
)  # fmt: skip

BEGINNINGS = (
    "initial_reason_steps", "initial_reasoning_steps", "initial_steps", "previous_steps", "steps_so_far",
    "partial_answer", "partial_response", "partial_solution", "partial_completion", "prefix", "response_prefix",
    "answer_prefix", "assistant_prefix", "completion_prefix", "prefill", "assistant_prefill",
)  # fmt: skip
"""An answer's beginning, which chosen and rejected go on from."""

THOUGHTS = (
    "reasoning_content", "thinking", "chosen_reasoning", "rejected_reasoning", "chosen_reasoning_content",
    "rejected_reasoning_content", "chosen_thinking", "rejected_thinking", "chosen_thoughts", "rejected_thoughts",
    "chosen_cot", "rejected_cot",
)  # fmt: skip
"""Reasoning that belongs to an answer and is not in its text."""

BETTER_AND_WORSE = (
    ("chosen", "rejected"), ("chosen", "reject"), ("preferred", "non_preferred"), ("preferred", "nonpreferred"),
    ("preferred", "dispreferred"), ("preferred", "unpreferred"), ("preferred", "not_preferred"),
    ("preferred", "rejected"), ("accepted", "rejected"), ("accept", "reject"), ("accepted", "refused"),
    ("selected", "rejected"), ("better", "worse"), ("best", "worst"), ("winning", "losing"), ("win", "lose"),
    ("winner", "loser"), ("won", "lost"), ("good", "bad"), ("positive", "negative"), ("pos", "neg"),
    ("correct", "incorrect"), ("liked", "disliked"), ("upvoted", "downvoted"), ("w", "l"), ("yw", "yl"),
)  # fmt: skip
"""What the columns of a pair are called, or one word of them."""

PARTS_OF_PAIRS = (
    "{}", "{}_response", "response_{}", "{}_answer", "answer_{}", "{}_output", "output_{}", "{}_completion",
    "completion_{}", "{}_text", "text_{}", "{}_messages", "messages_{}", "{}_conversation", "conversation_{}",
    "{}_conversations", "{}_message", "{}_reply", "{}_summary", "{}_sample", "{}_generation", "{}_solution",
    "{}_content", "{}_sequence", "{}_dialogue", "{}_resp", "y_{}",
)  # fmt: skip
"""Columns of a pair, {} being one of the words above. A name of one letter is none of its own."""

PAIRS = (
    ("response_j", "response_k"),  # stack-exchange-paired
    ("real", "generated"),  # SPIN
    ("messages", "rejected_messages"),  # ms-swift
    ("messages", "rejected_response"),
    ("response", "rejected_response"),
    ("output", "rejected_output"),
    ("answer", "rejected_answer"),
    ("completion", "rejected_completion"),
    ("correct_answer", "wrong_answer"),
    ("right_answer", "wrong_answer"),
)
"""Columns of pairs whose names have nothing else in common."""

MARKS = (tuple("abcdefghij"), tuple("0123456789"), tuple("123456789"), ("left", "right"), ("first", "second"))
"""What tells the columns of several answers apart, in their order."""

PARTS_OF_ANSWERS = (
    "response_{}", "answer_{}", "output_{}", "completion_{}", "conversation_{}", "generation_{}", "candidate_{}",
    "reply_{}", "text_{}", "summary_{}", "human_ref_{}", "orig_response_{}", "response_{}_text", "{}_response",
    "{}_answer", "{}_output", "{}_completion", "{}_text", "model_{}_response", "model_{}_answer", "model_{}_output",
    "response_model_{}", "output_model_{}", "answer_{}_body", "messages_{}", "chat_{}", "assistant_{}", "sample_{}",
    "solution_{}", "generated_{}", "resp_{}", "story_{}", "translation_{}", "option_{}", "choice_{}", "y_{}",
)  # fmt: skip
"""Columns of two or more answers, {} being a mark."""

VERDICTS = (
    "winner", "better_response_id", "better_response", "better_answer", "better", "preference", "overall_preference",
    "preferred", "preferred_response", "preferred_answer", "preferred_output", "human_preference",
    "preference_strength", "best_index", "best_idx", "better_index", "winner_index", "preferred_index", "chosen_idx",
    "orig_preference", "choice", "chosen", "chosen_id", "chosen_index", "selected", "selection", "verdict", "vote",
    "judgment", "judgement", "human_label", "gold_label", "preference_label", "label", "labels", "win", "best",
    "best_response", "best_answer", "ranking_winner", "clear_winner", "annotator_preference", "is_a_better",
    "is_b_better", "is_first_better", "a_is_better", "b_is_better", "a_wins", "b_wins",
)  # fmt: skip
"""Columns that say which answer is better."""

FLAGS = ("winner_model_{}", "winner_{}", "{}_wins", "{}_is_better", "is_{}_better", "{}_preferred", "preferred_{}")
"""Columns of which one is true, {} being a mark."""

TIES = ("winner_tie", "tie", "is_tie", "winner_model_tie")
"""The column that is true beside FLAGS when none of them is."""

SCORES = ("score", "rating", "reward", "rm_score", "reward_score", "upvotes", "votes", "quality", "elo", "win_rate")
RANKS = ("rank", "ranking", "position")
"""Of each answer, as the columns `score_{}`, `{}_score` and `response_{}_score`, or inside a list's elements."""

LISTS = (
    "answers", "completions", "responses", "generations", "all_generated_responses", "candidates", "outputs", "output",
    "summaries", "replies", "samples", "generated_responses", "model_outputs", "model_responses", "candidate_responses",
    "options", "choices", "solutions", "texts",
)  # fmt: skip
"""A column with a list of answers."""

TEXTS = (
    "response", "answer", "completion", "text", "content", "output", "generation", "generated_text", "messages",
    "conversation", "message", "reply", "value", "summary", "body", "solution",
)  # fmt: skip
"""Where an element of LISTS has its answer."""

ELEMENT_SCORES = (
    "fine_grained_score", "annotations.*.Rating", "overall_score", "score", "pm_score", "rating", "reward", "rm_score",
    "reward_score", "preference_score", "overall_rating", "quality", "upvotes", "votes", "elo",
)  # fmt: skip
"""Of an element of LISTS; UltraFeedback's `overall_score` comes late, since some of it is off by a factor of ten."""

ELEMENT_RANKS = ("rank", "ranking", "preference_rank", "position")

LIST_SCORES = (
    "scores", "ratings", "rating", "rewards", "all_rm_scores", "rm_scores", "reward_scores", "score", "overall_scores",
    "preference_scores",
)  # fmt: skip
LIST_RANKS = ("ranks", "ranking", "rankings", "rank")
"""Columns with a list of one number for each answer."""
