"""From votes to preference pairs, and the endpoint's route for feedback; no Ray."""

import asyncio
import itertools
import json
import random
import time

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from sampo_ray.config.serving import FeedbackConfig
from sampo_ray.console.main import app as cli
from sampo_ray.errors import FeedbackError
from sampo_ray.run.feedback import Answer, Judgement, Vote, make_vote, pairs_from, read_votes, votes_journal
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId
from sampo_ray.serve import errors
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.requests.openai import ChatCompletionRequest, validated
from sampo_ray.serve.routes.feedback import FeedbackRoutes, FeedbackStore, PendingAnswer, pending_answer
from sampo_ray.sources.rows import read_rows

ASK = [{"role": "user", "content": "Is it?"}]
OTHER = [{"role": "user", "content": "Why?"}]


def answer(key, text=None, messages=ASK, reason="stop", version=3, when=0.0):
    return Answer(
        id=key, messages=messages, text=key if text is None else text, finish_reason=reason, run="r",
        versions=(version,), time=when,
    )  # fmt: skip


def vote(answers, when=1.0, **judgement):
    return make_vote(Judgement.model_validate(judgement), answers, when)


def better(best, worst, when=1.0):
    return vote([best, worst], when, better=best.id, worse=worst.id)


def thumb(direction, each, when=1.0):
    return vote([each], when, response=each.id, thumb=direction)


def pairs_and_unused(*votes):
    rows, unused = pairs_from(votes)
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows], dict(unused)


A, B, C = answer("a"), answer("b"), answer("c")
CUT = answer("cut", reason="length")


def test_a_comparison_is_a_pair_with_its_evidence():
    [row], unused = pairs_from([better(answer("a", version=2), answer("b", version=5), when=7.0)])
    assert row["prompt"] == ASK and not unused
    assert row["chosen"] == [{"role": "assistant", "content": "a"}]
    assert row["rejected"] == [{"role": "assistant", "content": "b"}]
    evidence = row["feedback"]
    assert (evidence["for"], evidence["against"]) == (1, 0)
    assert (evidence["answers"], evidence["runs"]) == (["a", "b"], ["r"])
    assert (evidence["versions"], evidence["times"]) == ([2, 5], [7.0, 7.0])


def test_an_edit_is_better_than_the_original_even_if_that_was_cut():
    assert pairs_and_unused(vote([CUT], response="cut", edited="whole")) == ([("whole", "cut")], {})


def test_thumbs_up_and_down_of_one_prompt_make_pairs_in_the_order_of_time():
    votes = [thumb("up", A, 1), thumb("down", B, 2), thumb("down", C, 3), thumb("up", answer("x", messages=OTHER), 4)]
    assert pairs_and_unused(*votes) == ([("a", "b")], {"a thumb without its counterpart": 2})
    assert pairs_and_unused(*votes, thumb("up", answer("d"), 5))[0] == [("a", "b"), ("d", "c")]


def test_ties_make_no_pair():
    assert pairs_and_unused(vote([A, B], tie=["a", "b"])) == ([], {"tie": 1})


def test_contradicting_votes_cancel_and_the_majority_wins():
    again = answer("a2", "a")
    assert pairs_and_unused(better(A, B), better(B, A)) == ([], {"votes that contradict each other": 2})
    assert pairs_and_unused(better(A, B), better(B, A), better(again, B)) == ([("a", "b")], {})
    assert pairs_and_unused(better(B, A), thumb("up", A), thumb("down", B)) == (
        [],
        {"votes that contradict each other": 3},
    )
    assert pairs_and_unused(thumb("up", A), thumb("down", again)) == ([], {"thumbs up and down for the same answer": 2})
    [row], _ = pairs_from([better(A, B), better(B, A), better(again, B)])
    assert (row["feedback"]["for"], row["feedback"]["against"]) == (2, 1)


def test_a_cut_answer_is_rejected_but_never_chosen():
    assert pairs_and_unused(better(A, CUT)) == ([("a", "cut")], {})
    assert pairs_and_unused(better(CUT, A)) == ([], {"a cut answer is never chosen": 1})
    assert pairs_and_unused(thumb("up", CUT), thumb("down", A))[0] == []
    assert pairs_and_unused(better(CUT, A), vote([A], response="a", edited="cut")) == ([("cut", "a")], {})


def test_identical_and_empty_answers_make_no_pair():
    assert pairs_and_unused(better(A, answer("a2", "a"))) == ([], {"identical answers": 1})
    assert pairs_and_unused(better(A, answer("e", " "))) == ([], {"an empty answer": 1})


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "give better"),
        ({"better": "a"}, "give better"),
        ({"better": "a", "worse": "b", "tie": ["a", "b"]}, "give better"),
        ({"response": "a"}, "give better"),
        ({"response": "a", "thumb": "up", "edited": "x"}, "give better"),
        ({"better": "a", "worse": "a"}, "twice"),
        ({"tie": ["a", "a"]}, "twice"),
        ({"tie": ["a"]}, "tie"),
        ({"response": "a", "thumb": "sideways"}, "thumb"),
        ({"response": "a", "edited": "  "}, "empty"),
        ({"response": "", "thumb": "up"}, "response"),
        ({"response": "a" * 201, "thumb": "up"}, "response"),
        ({"response": "a", "thumb": "up", "note": "x" * 2001}, "note"),
        ({"response": "a", "thumb": "up", "more": 1}, "more"),
    ],
)
def test_an_invalid_judgement_names_the_field(body, word):
    with pytest.raises(ValidationError) as caught:
        Judgement.model_validate(body)
    assert word in errors.from_validation(caught.value).message


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9), st.just("up"),
    st.lists(st.text(max_size=2), max_size=3), st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)  # fmt: skip
FIELDS = [*Judgement.model_fields, "more"]


@given(body=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_any_object_is_a_judgement_or_names_its_mistake(body):
    mistake = judgement = None
    try:
        judgement = Judgement.model_validate(body)
    except ValidationError as error:
        mistake = errors.from_validation(error).message
    if mistake:
        assert mistake.partition(":")[0].partition("[")[0] in (*FIELDS, "body")
    else:
        assert (
            1 <= len(set(judgement.ids)) == len(judgement.ids) <= 2 and len(judgement.vote_id) == 32 and judgement.kind
        )


def test_a_judgement_must_fit_the_answers():
    with pytest.raises(FeedbackError, match="different prompts"):
        better(A, answer("x", messages=OTHER))
    with pytest.raises(FeedbackError, match="equals the original"):
        vote([A], response="a", edited="a")


def test_the_same_judgement_is_the_same_vote():
    assert better(A, B, 1).id == better(A, B, 9).id != better(B, A).id
    assert vote([A, B], tie=["a", "b"]).id == vote([B, A], tie=["b", "a"]).id
    assert vote([A], response="a", edited="x").id != vote([A], response="a", edited="y").id


ANSWERS = st.builds(
    lambda key, text, prompt, reason: answer(f"{prompt}{key}{text}{reason}", text, [ASK, OTHER][prompt], reason),
    st.integers(0, 3), st.sampled_from("xyz"), st.integers(0, 1), st.sampled_from(["stop", "length"]),
)  # fmt: skip
VOTES = st.lists(
    st.tuples(ANSWERS, ANSWERS, st.sampled_from(["better", "tie", "up", "down", "edited"]), st.integers(0, 9)).map(
        lambda drawn: Vote(
            id=json.dumps([drawn[0].id, drawn[1].id, drawn[2]]),
            kind=drawn[2],
            answers=(drawn[0], drawn[1].model_copy(update={"messages": drawn[0].messages}))
            if drawn[2] in ("better", "tie")
            else drawn[:1],
            edited="w" if drawn[2] == "edited" else None,
            time=drawn[3],
        )
    ),
    max_size=25,
    unique_by=lambda vote: vote.id,
)


@given(votes=VOTES, seed=st.integers(0, 99))
def test_pairs_do_not_depend_on_the_order_of_votes_and_each_vote_is_used_once_or_counted(votes, seed):
    rows, unused = pairs_from(votes)
    shuffled = votes + votes[:3]
    random.Random(seed).shuffle(shuffled)
    assert (rows, unused) == pairs_from(shuffled)
    used = [each for row in rows for each in row["feedback"]["votes"]]
    assert len(set(used)) == len(used)
    assert len(used) + unused.total() == len(votes)
    assert len({row["id"] for row in rows}) == len(rows)
    ended = {(a.messages[0]["content"], a.text) for v in votes for a in v.answers if a.finish_reason == "stop"}
    pairs = set()
    for row in rows:
        prompt, chosen, rejected = (row[name][-1]["content"] for name in ("prompt", "chosen", "rejected"))
        assert chosen != rejected and (prompt, rejected, chosen) not in pairs
        assert chosen == "w" or (prompt, chosen) in ended
        assert row["feedback"]["for"] > row["feedback"]["against"] >= 0
        pairs.add((prompt, chosen, rejected))


@given(votes=VOTES)
def test_votes_that_made_pairs_are_not_used_again_with_later_ones(votes):
    first, _ = pairs_from(votes[::2])
    used = {each for row in first for each in row["feedback"]["votes"]}
    second, _ = pairs_from(vote for vote in votes if vote.id not in used)
    assert used.isdisjoint(each for row in second for each in row["feedback"]["votes"])


def sse(*bodies):
    return "".join(f"data: {json.dumps(body)}\n\n" for body in bodies)


def chunk(content=None, reason=None, stop=None, **more):
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": reason, "stop_reason": stop}
    return {"id": "chatcmpl-1", "choices": [choice], **more}


@given(parts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))), cuts=st.sets(st.integers(0, 9)))
def test_a_streamed_answer_has_the_text_of_its_chunks(parts, cuts):
    events = [sse(chunk(part)) for part in parts] + [sse(chunk("", "stop", 7)), "data: [DONE]\n\n"]
    pending, found = PendingAnswer(ASK, WeightsId("r", 4)), []
    bounds = [0, *sorted(cut for cut in cuts if 0 < cut < len(events)), len(events)]
    for start, end in itertools.pairwise(bounds):
        found.append(pending.add_events("".join(events[start:end])))
    assert found[:-1] == [None] * (len(found) - 1)
    assert (found[-1].text, found[-1].finish_reason, found[-1].versions) == ("".join(parts), "stop", (4,))
    assert found[-1].messages == ASK and found[-1].id == "chatcmpl-1"


def test_a_streamed_answer_has_its_versions_and_the_reason_why_it_ended():
    pending = PendingAnswer(ASK, WeightsId("r", 4))
    spans = [{"version": 4}, {"version": 5, "from_tokens": [3]}]
    kept = pending.add_events(sse(chunk("hi"), chunk("", "stop", "###", policy_versions=spans)) + "data: [DONE]\n\n")
    assert (kept.versions, kept.finish_reason) == ((4, 5), "stop_string")
    broken = PendingAnswer(ASK, WeightsId("r", 4))
    assert broken.add_events(sse(chunk("hi"), {"error": {"code": "timeout"}})) is None


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"messages": [{"role": "system", "content": "x"}, *ASK, {"role": "assistant", "content": "y"}, *ASK]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": each} for each in "ab"]}]}, True),
        ({"n": 2}, False),
        ({"messages": [*ASK, {"role": "assistant", "content": "y"}]}, False),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}, *ASK]}, False),
        ({"continue_final_message": True, "add_generation_prompt": False}, False),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, False),
    ],
)  # fmt: skip
def test_only_answers_that_a_pair_can_be_made_of_are_kept(change, kept):
    request = validated({"model": "policy", "messages": ASK, **change}, ChatCompletionRequest)
    pending = pending_answer(request, WeightsId("r", 1))
    assert (pending is not None) == kept
    if "content" in str(change.get("messages", "")) and isinstance(request.messages[0]["content"], list):
        assert pending._messages == [{"role": "user", "content": "a\nb"}]


class Routes(FeedbackRoutes):
    def __init__(self, store):
        self.feedback_store = store

    def __del__(self):
        pass


@pytest.fixture
def endpoint(tmp_path):
    """Runs `work(store, post)` in an endpoint with a feedback store; each call is a new endpoint of the same run."""

    def run(work, **config):
        async def inside():
            async def where():
                return Place(str(tmp_path))

            store = FeedbackStore(where, FeedbackConfig(**{"keep_hours": 1, **config}))
            app = FastAPI()
            errors.install(app)
            routes = Routes(store)

            @app.post("/feedback")
            async def feedback(request: Request):
                return await routes.feedback(request)

            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

                async def post(**judgement):
                    reply = await client.post("/feedback", json=judgement)
                    return reply.status_code, reply.json() if reply.is_success else reply.json()["error"]["message"]

                await work(store, post)
            await store.close()

        asyncio.run(inside())
        return Place(str(tmp_path))

    return run


NOW = {"when": time.time()}
STORED = (200, {"stored": True, "duplicate": False})


def test_votes_are_durable_and_answers_outlive_the_endpoint(endpoint):
    async def first(store, post):
        store.keep(answer("a", **NOW))
        store.keep(answer("b", **NOW))
        assert await post(better="a", worse="b", note="clear") == STORED
        assert await post(better="a", worse="b") == (200, {"stored": True, "duplicate": True})
        assert [vote.note for vote in read_votes(place)] == ["clear"]

    async def second(store, post):
        assert await post(better="a", worse="b") == (200, {"stored": True, "duplicate": True})
        assert await post(response="b", thumb="down") == STORED
        assert await post(response="a", edited="a") == (
            400,
            "edited: equals the original answer; send thumb 'up' if the answer is good",
        )
        status, message = await post(response="nobody", thumb="up")
        assert status == 404 and "'nobody'" in message

    place = endpoint(lambda store, post: asyncio.sleep(0))
    endpoint(first)
    endpoint(second)
    assert len(read_votes(place)) == 2


def test_an_answer_is_kept_no_longer_than_the_operator_says(endpoint):
    async def work(store, post):
        store.keep(answer("old", when=time.time() - 4000))
        store.keep(answer("new", **NOW))
        await store._flush()
        assert (await post(response="old", thumb="up"))[0] == 404
        assert await post(response="new", thumb="up") == STORED

    endpoint(work)


def test_kept_answers_and_votes_are_bounded(endpoint):
    async def work(store, post):
        store._flushing.cancel()  # else it flushes now and then, and segments differ from run to run
        for index in range(5):
            store.keep(answer(f"k{index}", when=NOW["when"] + index))
        assert len(store._buffer) == 3
        for index in range(5, 12):
            await store._flush()
            store.keep(answer(f"k{index}", when=NOW["when"] + index))
        await store._flush()
        assert len(store._journals.answers) == 3
        assert await post(response="k11", thumb="up") == STORED
        assert await post(response="k10", thumb="up") == STORED
        assert (await post(response="k9", thumb="up"))[0] == 507

    endpoint(work, max_answers=3, max_votes=2)


def test_an_answer_that_is_kept_twice_counts_once_and_one_that_is_no_unicode_is_not_kept(endpoint):
    async def work(store, post):
        store._flushing.cancel()
        for text in ("a", "a" * 500):
            store.keep(answer("k", text, **NOW))
        store.keep(answer("broken", "\ud800", **NOW))
        assert list(store._buffer) == ["k"]
        assert store._buffered == len(store._buffer["k"]) > 500
        await store._flush()
        assert store._buffered == 0 and len(store._journals.answers) == 1
        assert (await post(response="broken", thumb="up"))[0] == 404

    endpoint(work)


def test_feedback_that_is_off_says_which_option_turns_it_on(endpoint):
    async def work(store, post):
        status, message = await post(better="a", worse="b")
        assert status == 403 and "serve.feedback.keep_hours" in message

    endpoint(work, keep_hours=0)


def test_a_folder_that_cannot_be_written_is_a_503_and_answers_stay_buffered(endpoint, monkeypatch):
    async def work(store, post):
        store.keep(answer("a", **NOW))
        with monkeypatch.context() as broken:
            broken.setattr(Place, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            assert (await post(response="a", thumb="up"))[0] == 503
            with pytest.raises(ApiError):
                await store._flush()
        assert await post(response="a", thumb="up") == STORED

    endpoint(work)


def test_votes_are_exported_as_preference_data(tmp_path):

    run, out = tmp_path / "run", tmp_path / "out.jsonl"
    assert CliRunner().invoke(cli, ["feedback", "export", str(run), str(out)]).exit_code == 1
    votes_journal(Place(str(run))).append([v.model_dump_json().encode() for v in (better(A, B), thumb("up", C))])
    result = CliRunner().invoke(cli, ["feedback", "export", str(run), str(out)])
    assert (
        result.exit_code == 0 and "1 pairs from 2 votes (without: 1 a thumb without its counterpart)" in result.output
    )
    [row] = read_rows(str(out), "pairs")
    assert (row.prompt, row.chosen["content"], row.rejected["content"]) == (ASK, "a", "b")
    assert row.columns["id"].startswith("feedback-") and row.columns["feedback"]["for"] == 1


def test_a_round_uses_votes_that_no_earlier_round_used_and_the_same_again_after_an_interruption(tmp_path, tiny_model):
    from sampo_ray.config.sections import DataConfig
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.loop.stages import _paired_votes

    run, chat = Place(str(tmp_path)), ChatFormat.load(tiny_model, "llama3-sampo")
    chat.save(tmp_path / "tokenizer")
    rounds = [run.at("rounds", str(index), "feedback") for index in range(3)]

    def store(*votes):
        votes_journal(run).append([vote.model_dump_json().encode() for vote in votes])

    def take(index):
        return _paired_votes(rounds[index], run, rounds[:index], run.at("tokenizer"), DataConfig(max_length=64))

    assert take(0) == take(0)
    assert take(0).rows == [] and take(0).votes == 0
    store(better(A, B), thumb("up", C), vote([A, B], tie=["a", "b"]))
    first = take(1)
    assert (first.rows, first.votes) == ([1], 1)
    assert first.left == {"tie": 1, "a thumb without its counterpart": 1}
    store(thumb("down", answer("d")))
    assert take(1) == first
    second = take(2)
    assert (second.rows, second.votes, second.left) == ([1], 2, {"tie": 1})
    [pair] = rounds[2].at("part-00000.parquet").read_table().to_pylist()
    assert pair["id"] == "feedback/pairs.jsonl:1" and pair["chosen_reward"] is None
    assert pair["chosen"] == chat.response_ids("c") and pair["prompt"] == chat.prompt_ids(ASK)


@pytest.mark.parametrize(("data", "from_feedback"), [("all", 0), ("all", 5), ("split", 5)])
def test_pairs_from_feedback_come_on_top_of_the_round_s_own(tmp_path, monkeypatch, data, from_feedback):
    from sampo_ray.config.run import load_config
    from sampo_ray.loop import rounds
    from sampo_ray.loop.display import open_display
    from sampo_ray.loop.rounds import Round
    from sampo_ray.run.directory import create_run
    from sampo_ray.run.parts import Part

    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "rounds": {"data": data, "count": 3}, "run": {"dir": ""}}
    orders = []
    for name, more in (("with", from_feedback), ("without", 0)):
        run = create_run(load_config(tree, [f"run.dir={tmp_path / name}"]))
        monkeypatch.setattr(rounds, "reorder", lambda parts, order, *_: orders.append(sorted(order.tolist())) or [])
        for index in range(3):
            round = Round(run, index, open_display())
            assert round.feedback() == [], "it is off"
            round.pairs([Part(run.place, 40)], [Part(run.place, more)] if more else [])
    assert orders[:3] == [[*order, *range(40, 40 + from_feedback)] for order in orders[3:]]
    assert sorted(itertools.chain(*orders[3:])) == sorted([*range(40)] * (1 if data == "split" else 3))
