"""AsyncEngine: one thread steps, coroutines wait."""

import asyncio
import math

import pytest
import torch

from multiexit_engine import AsyncEngine, Contrast, Engine, Exit, SamplingParams
from multiexit_engine.errors import EngineClosed, QueueFull, RequestFailed

LONG = SamplingParams(max_new_tokens=400, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture
def front(folder):
    """An engine of its own for each test: an AsyncEngine ends with its event loop."""

    def make(**options):
        return AsyncEngine.from_pretrained(folder, dtype="float32", device="cpu", **options)

    return make


def has_all_blocks(front):
    stats = front.stats()
    front._engine._scheduler.check_integrity()
    return stats.num_free_kv_blocks == stats.num_kv_blocks and not front._engine._core.requests


def test_many_callers_get_what_each_gets_alone(front, engine):
    prompts = [f"Prompt {i}" for i in range(20)]
    modes = [[None, Exit(2), Contrast(6, 2)][i % 3] for i in range(20)]
    wanted = [engine.generate(p, SHORT, m)[0] for p, m in zip(prompts, modes, strict=True)]

    async def run():
        async with front(max_batch_size=4) as async_engine:
            calls = [
                async_engine.generate(p, SHORT, m) for p, m in zip(prompts, modes, strict=True)
            ]
            outputs = await asyncio.gather(*calls)
            return outputs, has_all_blocks(async_engine)

    outputs, all_free = asyncio.run(run())
    assert [o.outputs for o in outputs] == [w.outputs for w in wanted]
    assert [o.prompt for o in outputs] == prompts
    assert all_free


def test_the_pieces_of_a_stream_add_up(front, engine):
    params = SamplingParams(max_new_tokens=20, temperature=2.0, n=2, seed=3)
    (wanted,) = engine.generate("Once", params)

    async def run():
        texts = ["", ""]
        async with front() as async_engine:
            async for piece in async_engine.stream("Once", params):
                texts[piece.index] += piece.text
        return texts

    assert asyncio.run(run()) == [output.text for output in wanted.outputs]


def test_leaving_a_stream_frees_its_blocks(front):
    async def run():
        async with front() as async_engine:
            stream = async_engine.stream("Once", LONG)
            await anext(stream)
            await stream.aclose()
            await async_engine.generate("other", SHORT)
            return has_all_blocks(async_engine)

    assert asyncio.run(run())


def test_cancelling_a_caller_frees_its_blocks(front):
    async def run():
        async with front() as async_engine:
            call = asyncio.create_task(async_engine.generate("Once", LONG))
            await asyncio.sleep(0.05)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert async_engine.num_requests == 0
            await async_engine.generate("other", SHORT)
            return has_all_blocks(async_engine)

    assert asyncio.run(run())


def test_more_requests_than_allowed_are_refused_at_once(front):
    async def run():
        async with front(max_requests=2) as async_engine:
            calls = [asyncio.create_task(async_engine.generate("a", SHORT)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFull, match="limit of 2"):
                await async_engine.generate("b", SHORT)
            await asyncio.gather(*calls)
            return await async_engine.generate("b", SHORT)

    assert asyncio.run(run()).finished


def test_one_wrong_prompt_refuses_all_that_came_with_it(front):
    async def run():
        async with front() as async_engine:
            with pytest.raises(ValueError, match=r"prompts\[1\]: .*token ids of this model"):
                await async_engine.submit(["good", [1, 99999]], SHORT)
            with pytest.raises(ValueError, match="exits at layers 2, 4, 6"):
                await async_engine.generate("good", SHORT, Exit(5))
            assert async_engine.num_requests == 0
            return has_all_blocks(async_engine)

    assert asyncio.run(run())


def test_a_poisoned_request_harms_no_other(front, engine):
    wanted = engine.generate("good", SHORT)[0].outputs
    poison = Contrast(6, 2, function=lambda upper, lower: torch.full_like(upper, math.nan))

    async def run():
        async with front() as async_engine:
            good = [asyncio.create_task(async_engine.generate("good", SHORT)) for _ in range(4)]
            with pytest.raises(RequestFailed, match="NaN"):
                await async_engine.generate("bad", SHORT, poison)
            return await asyncio.gather(*good), has_all_blocks(async_engine)

    outputs, all_free = asyncio.run(run())
    assert [output.outputs for output in outputs] == [wanted] * 4
    assert all_free


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(front, caplog):
    async def run():
        async with front() as async_engine:
            core = async_engine._engine._core
            run_batch = core.runner.run

            def break_once(batch):
                core.runner.run = run_batch
                raise RuntimeError("out of memory")

            core.runner.run = break_once
            with pytest.raises(RequestFailed, match="out of memory"):
                await async_engine.generate("a", SHORT)
            output = await async_engine.generate("b", SHORT)
            return output, has_all_blocks(async_engine)

    output, all_free = asyncio.run(run())
    assert output.finished and all_free
    assert "a step failed" in caplog.text


def test_draining_finishes_what_runs_and_refuses_the_rest(front):
    async def run():
        async with front() as async_engine:
            call = asyncio.create_task(async_engine.generate("a", SHORT))
            await asyncio.sleep(0)
            async_engine.stop_accepting()
            with pytest.raises(EngineClosed):
                await async_engine.generate("b", SHORT)
            await async_engine.wait_idle()
            return await call

    assert len(asyncio.run(run()).outputs[0].token_ids) == 12


def test_aborting_all_tells_everybody_who_waits(front):
    async def run():
        async with front() as async_engine:
            calls = [asyncio.create_task(async_engine.generate("a", LONG)) for _ in range(3)]
            await asyncio.sleep(0.02)
            async_engine.abort_all()
            return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(run())
    assert all(isinstance(r, RequestFailed) and "shut down" in str(r) for r in results)


def test_another_event_loop_is_refused(folder):
    async_engine = AsyncEngine(Engine.from_pretrained(folder, dtype="float32", device="cpu"))

    async def generate():
        return await async_engine.generate("a", SHORT)

    async def close():
        await async_engine.close()

    async def run():
        await generate()
        with pytest.raises(RuntimeError, match="event loop"):
            await asyncio.to_thread(asyncio.run, generate())
        await close()

    asyncio.run(run())
