"""Shapes of a request trace: percentiles, rollouts per prompt, and what is refused."""

import json
from pathlib import Path

import pytest

from bench.formats.traffic import Point, read_traffic
from model.errors import InputError


def trace(folder: Path, *requests: dict | str, name: str = "trace.jsonl") -> Path:
    path = folder / name
    lines = [r if isinstance(r, str) else json.dumps(r) for r in requests]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def mooncake(prompt: int, generated: int, **more: object) -> dict:
    return {"timestamp": 0, "input_length": prompt, "output_length": generated} | more


class TestPercentiles:
    def test_smallest_value_that_so_many_do_not_exceed(self, tmp_path):
        """Guards the rank: rounding it, or counting from 1, gives a neighbour."""
        path = trace(tmp_path, *(mooncake(length, 2 * length) for length in range(100, 0, -1)))
        points = read_traffic(path, (1, 50, 50.5, 99, 100)).points
        assert [point.prefix for point in points] == [1, 50, 51, 99, 100]
        assert [point.suffix for point in points] == [1, 50, 51, 99, 100]

    def test_each_length_has_its_own(self, tmp_path):
        """Guards against sorting requests by their prompts and taking the others along."""
        path = trace(tmp_path, mooncake(10, 600), mooncake(20, 400), mooncake(30, 200))
        assert read_traffic(path, [50, 100]).points == (
            Point((50,), 1, 20, 200),
            Point((100,), 1, 30, 300),
        )

    def test_same_shape_is_one_point(self, tmp_path):
        """Guards against timing one shape four times."""
        traffic = read_traffic(trace(tmp_path, mooncake(8, 5)))
        assert [point.name for point in traffic.points] == ["p10/p50/p90/p99 B1 P8 S3"]

    @pytest.mark.parametrize("percentile", [0, -1, 100.1, float("nan")])
    def test_a_percentile_is_above_0_and_at_most_100(self, tmp_path, percentile):
        """Guards against an index from the end of the list."""
        with pytest.raises(InputError, match="above 0 and at most 100"):
            read_traffic(trace(tmp_path, mooncake(8, 5)), [percentile])


class TestRollouts:
    def test_completions_share_a_prompt_and_its_tokens(self, tmp_path):
        """Guards `n`: its tokens are those of all completions."""
        usage = {"prompt_tokens": 100, "completion_tokens": 640}
        traffic = read_traffic(trace(tmp_path, {"n": 16, "usage": usage}), [50])
        assert [point.name for point in traffic.points] == ["p50 B16 P100 S20"]

    def test_equal_blocks_are_one_problem(self, tmp_path):
        """Guards widths, and prompts that would count once per rollout."""
        same = [mooncake(600, 40, hash_ids=[1, 2]) for _ in range(3)]
        path = trace(tmp_path, *same, mooncake(600, 40, hash_ids=[1, 3]), mooncake(9, 8))
        traffic = read_traffic(path, [34, 100])
        assert (traffic.requests, traffic.problems) == (5, 3)
        assert [(point.batch, point.prefix) for point in traffic.points] == [(1, 600), (3, 600)]

    def test_empty_blocks_are_no_prompt(self, tmp_path):
        """Guards against one problem of all requests that name no blocks."""
        path = trace(tmp_path, mooncake(5, 5, hash_ids=[]), mooncake(5, 5, hash_ids=[]))
        assert read_traffic(path).problems == 2

    def test_width_replaces_the_traces(self, tmp_path):
        """Guards the option for PaCoRe on a trace with one completion per prompt."""
        path = trace(tmp_path, mooncake(1822, 1280))
        assert read_traffic(path, [50], width=16).points[0].name == "p50 B16 P1822 S640"


class TestFormats:
    @pytest.mark.parametrize(
        "lines",
        [
            ['{"input_tokens": 7, "output_tokens": 12.0}'],
            ["", '{"prompt_tokens": 7, "completion_tokens": 12, "n": null}', ""],
            ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.68,7,12"],
            [
                "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
                "5,ChatGPT,7,12,19,Conversation log",
            ],
            ["n,ContextTokens,GeneratedTokens", "first,7,12,extra"],
        ],
    )
    def test_names_of_public_traces(self, tmp_path, lines):
        """Guards the names of each format, and columns that mean something else."""
        assert read_traffic(trace(tmp_path, *lines), [50]).points[0].name == "p50 B1 P7 S6"

    def test_requests_without_tokens_are_left_out(self, tmp_path):
        """Guards against shapes of failed requests, which BurstGPT has with 0 and 0 tokens."""
        path = trace(tmp_path, mooncake(0, 0), mooncake(7, 0), mooncake(0, 7), mooncake(7, 12))
        with pytest.warns(UserWarning, match="left out: 3$"):
            assert read_traffic(path).requests == 1

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([], "has no requests"),
            (["a,b", "1,2"], "line 2: no numbers of tokens; it must have input_length and"),
            ([mooncake(1, 1), "{"], "line 2: not a JSON object"),
            ([mooncake(1, 1), {"input_length": 1}], "line 2: output_length is None; it must be an"),
            ([mooncake(1, True)], "output_length is True"),
            ([mooncake(1, 1.5)], r"output_length is 1\.5"),
            ([mooncake(-1, 1)], "input_length is -1"),
            (['{"input_length": 1e999, "output_length": 1}'], "input_length is inf"),
            ([mooncake(1, 1, n=0)], "n is 0; it must be an integer from 1"),
            ([mooncake(1, 1, hash_ids=3)], "hash_ids is 3; it must be a list"),
            (["ContextTokens,GeneratedTokens", "1,\0"], "line 2: "),
            ([mooncake(0, 3)], "has no requests with tokens"),
        ],
    )
    def test_one_line_says_what_is_wrong(self, tmp_path, lines, message):
        """Guards against tracebacks, and shapes of what is no number of tokens."""
        with pytest.raises(InputError, match=message) as error:
            read_traffic(trace(tmp_path, *lines))
        assert "\n" not in str(error.value)

    def test_missing_file(self, tmp_path):
        """Guards the name in the message."""
        with pytest.raises(InputError, match="no such file"):
            read_traffic(tmp_path / "none.jsonl")
