// Feedback on answers: bodies of `POST /feedback`, and sending them.

import { post, Refused } from "./api.js";

export const better = (one, other) => ({ better: one.id, worse: other.id });
export const tie = (one, other, note) => ({ tie: [one.id, other.id], ...(note && { note }) });
export const thumb = (answer, value) => ({ response: answer.id, thumb: value });
export const edited = (answer, text) => ({ response: answer.id, edited: text });

const OFF = "This endpoint does not take feedback. Its operator can turn it on in the recipe (serve.feedback).";

// Sends feedback; returns {stored, final, text}. Not final: trying again may help. The text is for the user.
export async function judge(judgement) {
  try {
    const answer = await post("feedback", judgement);
    return { stored: true, final: true, text: answer.duplicate ? "This was stored before." : "Stored, thank you." };
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    const off = error.status === 404 && /no such route/.test(error.message);
    return { stored: false, final: [403, 404].includes(error.status), text: off ? OFF : `Not stored. ${error.sentence}` };
  }
}
