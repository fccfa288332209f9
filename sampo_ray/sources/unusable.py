"""Why a row cannot be used: the reasons that rows are dropped and counted under."""

UNREADABLE = "neither text nor a list of messages"
TEXTLESS = "a message without text"
ROLES = "wrong roles"
IMAGES = "images, audio or files"
REASONING = "reasoning beside the text of a message"
MARKS = "marks of a chat template within a text"
TRANSCRIPT = "a transcript that cannot be split into turns"
PREFIX = "an answer begun in the prompt"
CALLS = "tool calls that cannot be read"
EXTRAS = "a message that holds more than role and text"
SPELLED = "messages in a string that is cut off or no JSON"
UNICODE = "not valid Unicode"


class Unusable(Exception):
    """A row or prompt that is dropped; the message is the reason it is counted under."""
