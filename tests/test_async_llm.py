"""An LLM to be awaited."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

from hopskip import LLM, AsyncLLM, ClosedError, ConfigError, PromptError, SpeculativeConfig
from tests.test_llm_options import USER, thinking_llm

DRAFT = SpeculativeConfig(draft="both", exit_layer=1, num_draft_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return thinking_llm(folder)


def make(folder: Path) -> AsyncLLM:
    return AsyncLLM(folder, speculative=DRAFT, dtype="float32", backend="native")


async def until_idle(model: AsyncLLM) -> None:
    while model._llm.engine.has_work:
        await asyncio.sleep(0.005)


def test_what_is_awaited_is_what_llm_gives(folder: Path, llm: LLM) -> None:
    async def main() -> None:
        async with make(folder) as model:
            assert "AsyncLLM" in repr(model)
            calls = [model.generate(text, max_tokens=9, temperature=1.0, seed=4, n=2) for text in ("abc", "de", "f")]
            found = await asyncio.gather(*calls, model.chat([USER], max_tokens=5, enable_thinking=False))
            for text, [result] in zip(("abc", "de", "f"), found[:3], strict=True):
                expected = llm.generate(text, max_tokens=9, temperature=1.0, seed=4, n=2)[0]
                assert [output.token_ids for output in result.outputs] == [o.token_ids for o in expected.outputs]
                assert result.text == expected.text
            assert found[3][0].text == llm.chat([USER], max_tokens=5, enable_thinking=False)[0].text
            [result] = await model.generate("abc", regex="[ab]{4}")
            assert result.text == llm.generate("abc", regex="[ab]{4}")[0].text

    asyncio.run(main())


def test_a_stream_gives_the_same_pieces(folder: Path, llm: LLM) -> None:
    expected = list(llm.stream([USER], max_tokens=20, stop="e", enable_thinking=False))

    async def main() -> None:
        async with make(folder) as model:
            stream = model.stream([USER], max_tokens=20, stop="e", enable_thinking=False)
            pieces = [piece async for piece in stream]
        assert [(p.text, p.token.id) for p in pieces] == [(p.text, p.token.id) for p in expected]
        assert [piece.result is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        assert pieces[-1].result is not None
        assert pieces[-1].result.text == "".join(piece.text for piece in pieces)
        assert model.__class__ is AsyncLLM

    asyncio.run(main())


def test_who_is_cancelled_or_leaves_is_dropped(folder: Path, llm: LLM) -> None:
    async def main() -> None:
        async with make(folder) as model:
            for awaited in (model.generate("abc", max_tokens=900, ignore_eos=True), first(model)):
                task = asyncio.ensure_future(awaited)
                while not model._llm.engine.has_work and not task.done():
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await asyncio.wait_for(until_idle(model), 20)
            async with aclosing(model.stream("abc", max_tokens=900, ignore_eos=True)) as stream:  # type: ignore[type-var]
                async for _ in stream:
                    break
            await asyncio.wait_for(until_idle(model), 20)
            [result] = await model.generate("abc", max_tokens=4)
            assert result.token_ids == llm.generate("abc", max_tokens=4)[0].token_ids

    async def first(model: AsyncLLM) -> None:
        async for _ in model.stream("abc", max_tokens=900, ignore_eos=True):
            await asyncio.sleep(3600)

    asyncio.run(main())


def test_wrong_input_is_refused_as_by_llm(folder: Path) -> None:
    async def main() -> None:
        async with make(folder) as model:
            with pytest.raises(PromptError, match="prompts is None"):
                await model.generate(None)  # type: ignore[arg-type]
            with pytest.raises(PromptError, match="token id 1000000"):
                await model.generate([[7], [10**6]])
            with pytest.raises(ConfigError, match=r"max_tokens is 5\.0"):
                await model.generate("abc", max_tokens=5.0)  # type: ignore[arg-type]
            with pytest.raises(PromptError, match="a chat is a list"):
                await model.chat("abc")  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match="a stream has one text"):
                async for _ in model.stream("abc", n=2, temperature=1.0):
                    pass

    asyncio.run(main())


def test_closing_ends_who_waits(folder: Path) -> None:
    async def read(model: AsyncLLM) -> None:
        async for _ in model.stream("abc", max_tokens=900, ignore_eos=True):
            await asyncio.sleep(0)

    async def main() -> None:
        model = make(folder)
        waiting = [
            asyncio.ensure_future(model.generate(["abc"] * 30, max_tokens=900, ignore_eos=True)),
            asyncio.ensure_future(read(model)),
        ]
        while not model._llm._opened or not model._llm.engine.running:
            await asyncio.sleep(0.001)
        await model.close()
        for found in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(found, ClosedError), found
        with pytest.raises(ClosedError):
            await model.generate("abc")
        with pytest.raises(ClosedError):
            await read(model)
        await model.close()
        assert "closed" in repr(model)

    asyncio.run(main())


def test_one_event_loop_after_another(folder: Path, llm: LLM) -> None:
    expected = llm.generate("abc", max_tokens=6)[0].token_ids
    model = make(folder)

    async def main() -> None:
        assert (await model.generate("abc", max_tokens=6))[0].token_ids == expected

    async def leave() -> None:
        left = asyncio.ensure_future(model.generate("abc", max_tokens=900, ignore_eos=True))
        while not model._llm.engine.has_work and not left.done():
            await asyncio.sleep(0.001)

    for work in (main, leave, main):
        asyncio.run(work())
    open_loop = asyncio.new_event_loop()
    open_loop.run_until_complete(main())

    async def elsewhere() -> None:
        with pytest.raises(ConfigError, match="another event loop that is still open"):
            await model.generate("abc")

    asyncio.run(elsewhere())
    open_loop.run_until_complete(model.close())
    open_loop.close()


def test_it_needs_nothing_of_the_server() -> None:
    """No package that only `serve` brings along is imported for it."""
    code = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'uvicorn', 'pydantic', 'prometheus_client', 'llguidance'):\n"
        "    sys.modules[name] = None\n"
        "from hopskip import AsyncLLM\n"
        "print(AsyncLLM.__name__)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "AsyncLLM\n"
