"""``python -m kt_kernel.bench serving``: what the users of a running server get, by SGLang's own ``bench_serving``.

Each user sends a request, waits for the whole answer and sends the next one. Two workloads: prompts of random tokens
that share nothing, and prompts of as many tokens behind a prefix that all share, which the server has in its prefix
cache. Every answer must have exactly the tokens that were asked for.

    first token    = time from sending a request to the first text of its answer, the server's queue included
    tokens/s, user = tokens after the first text / time after the first text, of one request
    tokens/s, all  = tokens of all answers / time from the first request to the last answer
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kt_kernel.bench.conditions import PICTURES, check_plot, commit, machine, positive_numbers
from kt_kernel.proxy import bypass_proxy_for_own_traffic

CLIENT = "kt_kernel.integrations.sglang.bench_serving"
ANSWER_SECONDS = 30
# What is kept of /server_info; the rest has keys and passwords.
SERVER_FIELDS = ("version", "model_path", "kt_method", "max_running_requests", "max_total_num_tokens")


class WrongAnswerError(RuntimeError):
    """The server, or ``bench_serving``, did not do what was asked."""


@dataclass(frozen=True)
class Workload:
    """The prompts of a run: `shared_tokens` that all have in common, then `own_tokens` that none shares."""

    name: str
    shared_tokens: int
    own_tokens: int
    output_tokens: int

    @property
    def skipped_requests(self) -> int:
        """Requests at the start of a run that are not counted.

        ``bench_serving`` warms up with the first request of a run; where the cache is not flushed after that, all of
        this request's prompt is there already.
        """
        return 1 if self.shared_tokens else 0

    def flags(self, num_requests: int) -> list[str]:
        """Return the flags of ``bench_serving`` for the prompts of one run."""
        if not self.shared_tokens:
            # ids, because the tokens of a text are others when it is encoded again
            flags = ["--dataset-name", "random-ids", "--tokenize-prompt", "--flush-cache"]
            numbers = {"random-input-len": self.own_tokens, "random-output-len": self.output_tokens}
            numbers |= {"random-range-ratio": 1, "num-prompts": num_requests}
        else:
            # with routing keys no prompts are kept in ~/.cache, under a name that another model's would have too
            flags = ["--dataset-name", "generated-shared-prefix", "--gsp-ordered", "--gsp-send-routing-key"]
            numbers = {"gsp-num-groups": 1, "gsp-prompts-per-group": num_requests}
            numbers |= {"gsp-system-prompt-len": self.shared_tokens, "gsp-question-len": self.own_tokens}
            numbers |= {"gsp-output-len": self.output_tokens}
        return flags + [word for name, number in numbers.items() for word in (f"--{name}", str(number))]


@dataclass
class Row:
    """What one number of users got in one workload."""

    users: int
    requests: int
    prompt_tokens: float
    cached_share: float
    first_token_ms: float
    slowest_first_token_ms: float
    user_tokens_per_s: float
    slowest_user_tokens_per_s: float
    total_tokens_per_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the bench."""
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of a running server (%(default)s)")
    parser.add_argument("--users", default="1,4,8,12", help="numbers of users, comma separated (%(default)s)")
    parser.add_argument("--requests", type=int, default=4, help="requests of each user, one by one (%(default)s)")
    parser.add_argument("--input-tokens", type=int, default=256, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens of an answer (%(default)s)")
    parser.add_argument(
        "--shared-tokens",
        type=int,
        default=1024,
        help="tokens of the prefix before the prompts of the second workload; 0 leaves it out (%(default)s)",
    )
    parser.add_argument("--tokenizer", help="folder of the tokenizer, where the server is on another machine")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a number of users may take (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw the tables ({', '.join(PICTURES)})")


def main(args: argparse.Namespace) -> int:
    """Run the bench and print its result.

    Returns
    -------
    int
        Exit code: 0 done, 1 wrong answers, 2 an impossible request.
    """
    bypass_proxy_for_own_traffic()
    try:
        users = check_arguments(args)
        server = ask_server(args.url)
        workloads = choose_workloads(args, server)
        tokenizer = find_tokenizer(args.tokenizer, server)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    result = {
        "command": command_line(args),
        "commit": commit(),
        "machine": machine(),
        "server": {name: server.get(name) for name in SERVER_FIELDS},
        "requests_of_a_user": args.requests,
        "workloads": [asdict(workload) | {"rows": []} for workload in workloads],
    }
    try:
        for index, row in run_all(args, workloads, users, tokenizer):
            result["workloads"][index]["rows"].append(asdict(row))
            # all of it: a run takes minutes, and what is measured is not lost when it is interrupted
            print(
                f"{workloads[index].name}, users {row.users}: {row.total_tokens_per_s:.1f} tokens/s in total, "
                f"{row.user_tokens_per_s:.1f} of a user (slowest {row.slowest_user_tokens_per_s:.1f}), first token "
                f"after {row.first_token_ms:.0f} ms (slowest {row.slowest_first_token_ms:.0f})",
                file=sys.stderr,
            )
    except WrongAnswerError as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)
    if args.plot:
        plot(result, args.plot)
    return 0


def check_arguments(args: argparse.Namespace) -> list[int]:
    """Return the numbers of users, ascending; ValueError with one sentence where a flag cannot be honoured."""
    users = sorted(set(positive_numbers("--users", args.users)))
    for name in ("requests", "input_tokens", "timeout"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0.")
    if args.output_tokens < 2:
        raise ValueError(f"--output-tokens is {args.output_tokens}; a speed needs at least 2.")
    if args.shared_tokens < 0:
        raise ValueError(f"--shared-tokens is {args.shared_tokens}; it must be 0 (no shared prefix) or more.")
    if args.shared_tokens and users[0] * args.requests < 2:
        raise ValueError(
            "--requests is 1 and the first of it is not counted behind a shared prefix, so one user has none; use "
            "--requests 2, or --shared-tokens 0."
        )
    check_plot(args.plot)
    args.url = args.url.rstrip("/")
    if urlsplit(args.url).scheme not in ("http", "https") or not urlsplit(args.url).hostname:
        raise ValueError(f"--url is {args.url}; it must be like http://127.0.0.1:30000.")
    return users


def fetch(url: str) -> bytes:
    """Return the body of a URL.

    Raises
    ------
    OSError
        No connection, or a status that is no success (`urllib.error.HTTPError`).
    """
    request = urllib.request.Request(url)
    if key := os.environ.get("OPENAI_API_KEY"):  # where bench_serving takes it from
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        return answer.read()


def ask_server(url: str) -> dict:
    """Return what a running SGLang says of itself; ValueError where there is none."""
    try:
        info = json.loads(fetch(f"{url}/server_info"))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ValueError(f"the server at {url} asks for a key; set OPENAI_API_KEY to it.") from None
        info = f"status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"no server answers at {url} ({reason}); start one, or give its --url.") from None
    except ValueError:
        info = "no JSON"
    if not isinstance(info, dict) or "internal_states" not in info:
        found = info if isinstance(info, str) else "other JSON"
        raise ValueError(
            f"the server at {url} is not SGLang: its /server_info is {found}; give the --url of an SGLang server."
        )
    return info


def find_tokenizer(wanted: str | None, server: dict) -> str:
    """Return the tokenizer that makes the prompts; ValueError where it is a folder that is not here."""
    name = wanted or server.get("tokenizer_path") or server["model_path"]
    if (wanted or Path(name).is_absolute()) and not Path(name).exists():
        raise ValueError(f"the tokenizer {name} is not on this machine; give a copy of its folder with --tokenizer.")
    return name


def choose_workloads(args: argparse.Namespace, server: dict) -> list[Workload]:
    """Return the workloads the flags ask for; ValueError where a request is longer than the server takes.

    Random prompts come first: their runs flush the prefix cache, also of what an earlier bench left there.
    """
    workloads = [Workload("random prompts", 0, args.input_tokens, args.output_tokens)]
    if args.shared_tokens:
        workloads.append(Workload("shared prefix", args.shared_tokens, args.input_tokens, args.output_tokens))
    limit = server.get("max_req_input_len")
    longest = args.shared_tokens + args.input_tokens + args.output_tokens
    if limit is not None and longest > limit:
        raise ValueError(
            f"--shared-tokens, --input-tokens and --output-tokens are {longest} together, more than the {limit} of "
            "this server; ask for fewer, or start it with a longer --context-length or more --max-total-tokens."
        )
    return workloads


def command_line(args: argparse.Namespace) -> str:
    """Return the command that repeats the run, defaults included."""
    names = ("url", "users", "requests", "input_tokens", "output_tokens", "shared_tokens")
    words = [word for name in names for word in ("--" + name.replace("_", "-"), str(getattr(args, name)))]
    return shlex.join(["python", "-m", "kt_kernel.bench", "serving", *words])


def client_flags(args: argparse.Namespace, workload: Workload, users: int, tokenizer: str, output: Path) -> list[str]:
    """Return the flags of ``bench_serving`` for one run."""
    # past the end of its answer a model may give special tokens; skipped, they have no text, and what has no text
    # bench_serving does not count
    sampling = {"temperature": 0, "max_new_tokens": workload.output_tokens, "ignore_eos": True}
    body = {"sampling_params": sampling | {"skip_special_tokens": False}}
    fixed = {
        "--backend": "sglang",
        "--base-url": args.url,
        "--model": tokenizer,  # it looks for a chat template there, and else on the hub under the served name
        "--tokenizer": tokenizer,
        "--max-concurrency": users,
        "--seed": 1000 * workload.shared_tokens + users,  # no two runs with the same prompts
        "--extra-request-body": json.dumps(body),
        "--output-file": output,
    }
    flags = [str(word) for pair in fixed.items() for word in pair]
    return [*flags, *workload.flags(users * args.requests), "--output-details", "--cache-report", "--disable-tqdm"]


def run_all(
    args: argparse.Namespace, workloads: list[Workload], users: list[int], tokenizer: str
) -> Iterator[tuple[int, Row]]:
    """Run ``bench_serving`` for each workload and number of users; yield each result with its workload's index.

    Raises
    ------
    WrongAnswerError
        A request was not answered as asked, or ``bench_serving`` failed or took too long; its log is kept.
    """
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    if Path(tokenizer).exists():
        environment["HF_HUB_OFFLINE"] = "1"  # nothing is missing here that the hub could have
    with tempfile.TemporaryDirectory(prefix="kt_bench_serving_") as name:
        folder = Path(name)
        runs = [(index, number) for index in range(len(workloads)) for number in users]
        outputs = [folder / f"{i}.jsonl" for i in range(len(runs))]
        flags = [
            client_flags(args, workloads[index], number, tokenizer, output)
            for (index, number), output in zip(runs, outputs, strict=True)
        ]
        (folder / "runs.json").write_text(json.dumps(flags))
        descriptor, log = tempfile.mkstemp(prefix="kt_bench_serving_", suffix=".log")
        with open(descriptor, "w") as stream:
            client = subprocess.Popen(
                [sys.executable, "-m", CLIENT, folder / "runs.json"],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        try:
            for (index, number), output in zip(runs, outputs, strict=True):
                record = wait_for_output(client, output, args.timeout, Path(log))
                yield index, summarize(record, workloads[index], number)
        except WrongAnswerError as error:
            raise WrongAnswerError(f"{error} (log of bench_serving: {log})") from None
        finally:
            client.kill()
            client.wait()
    Path(log).unlink()


def wait_for_output(client: subprocess.Popen, output: Path, timeout: float, log: Path) -> dict:
    """Return the line that ``bench_serving`` writes at the end of a run."""
    deadline = time.monotonic() + timeout
    while True:
        ended = client.poll() is not None
        if output.exists() and (text := output.read_text()).endswith("\n"):
            return json.loads(text)
        if ended:
            lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
            raise WrongAnswerError(
                f"bench_serving ended with code {client.returncode} and without a result: {lines[-1][:500]}"
            )
        if time.monotonic() > deadline:
            raise WrongAnswerError(f"bench_serving had no result after {timeout:g} s; raise --timeout.")
        time.sleep(0.1)


def summarize(record: dict, workload: Workload, users: int) -> Row:
    """Check the answers of one run and take medians over its requests.

    Parameters
    ----------
    record : dict
        What ``bench_serving --output-details --cache-report`` wrote: figures of the run, and lists with one entry for
        each request, ``itls`` with the seconds between tokens.
    workload : Workload
        What was asked for.
    users : int
        How many requests ran at a time.

    Raises
    ------
    WrongAnswerError
        A request failed, or its answer has another number of tokens.
    """
    where = f"{workload.name}, users {users}: request"
    numbers = zip(record["errors"], record["output_lens"], record["ttfts"], record["itls"], strict=True)
    for i, (error, tokens, first_token, gaps) in enumerate(numbers):
        if error:
            raise WrongAnswerError(f"{where} {i} failed: {error.strip().splitlines()[-1][:500]}")
        if tokens != workload.output_tokens or not first_token:
            found = tokens if first_token else 0  # without any text, output_lens has what was asked for
            raise WrongAnswerError(f"{where} {i} returned {found} tokens instead of {workload.output_tokens}.")
        if not sum(gaps):
            raise WrongAnswerError(f"{where} {i} came in one piece, so it has no speed; raise --output-tokens.")
    counted = slice(workload.skipped_requests, None)
    first_tokens = [1000 * seconds for seconds in record["ttfts"][counted]]
    speeds = [len(gaps) / sum(gaps) for gaps in record["itls"][counted]]
    prompts = record["input_lens"][counted]
    return Row(
        users=users,
        requests=len(first_tokens),
        prompt_tokens=statistics.median(prompts),
        cached_share=sum(record["cached_tokens"][counted]) / sum(prompts),
        first_token_ms=statistics.median(first_tokens),
        slowest_first_token_ms=max(first_tokens),
        user_tokens_per_s=statistics.median(speeds),
        slowest_user_tokens_per_s=min(speeds),
        total_tokens_per_s=record["output_throughput"],
    )


def print_tables(result: dict) -> None:
    """Print a result of :func:`main` as one table in Markdown for each workload."""
    server = result["server"]
    print(f"{result['machine']}; commit {result['commit'] or 'unknown'}")
    print(f"`{result['command']}`")
    print(
        f"SGLang {server['version']}, {server['model_path']}, CPU experts {server['kt_method'] or 'off'}; at most "
        f"{server['max_running_requests']} requests at a time, KV pool of {server['max_total_num_tokens']} tokens"
    )
    for workload in result["workloads"]:
        own = f"{workload['own_tokens']} tokens of its own"
        prompt = f"{workload['shared_tokens']} tokens that all share, then {own}" if workload["shared_tokens"] else own
        print(
            f"\n{workload['name']}: a prompt has {prompt}, an answer {workload['output_tokens']}; each user sends "
            f"{result['requests_of_a_user']} requests, one after the other\n"
        )
        print(
            "| users | prompt tokens | from the cache | first token, ms: median | slowest | tokens/s of a user: median "
            "| slowest | in total |"
        )
        print("|---:" * 8 + "|")
        for row in workload["rows"]:
            print(
                f"| {row['users']} | {row['prompt_tokens']:.0f} | {100 * row['cached_share']:.0f} % | "
                f"{row['first_token_ms']:.0f} | {row['slowest_first_token_ms']:.0f} | {row['user_tokens_per_s']:.1f} | "
                f"{row['slowest_user_tokens_per_s']:.1f} | {row['total_tokens_per_s']:.1f} |"
            )
    most = max(row["users"] for workload in result["workloads"] for row in workload["rows"])
    if server["max_running_requests"] is not None and most > server["max_running_requests"]:
        print(
            f"\nThe server computes at most {server['max_running_requests']} requests at a time "
            "(--max-running-requests): more users wait."
        )


def plot(result: dict, file: Path) -> None:
    """Draw a result of :func:`main` over the users: one line for each workload in three pictures side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    pictures = {
        "total_tokens_per_s": "tokens/s in total",
        "user_tokens_per_s": "tokens/s of a user (median)",
        "first_token_ms": "first token, ms (median)",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        for workload in result["workloads"]:
            users = [row["users"] for row in workload["rows"]]
            axes.plot(users, [row[name] for row in workload["rows"]], marker="o", label=workload["name"])
        axes.set(title=title, xlabel="users", xticks=users, ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
