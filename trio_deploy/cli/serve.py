"""`trio serve`: answer OpenAI's clients."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from trio_deploy.cli.options import add_bundle, add_runtime_options, bundle_of, runtime_options
from trio_deploy.cli.terminal import say
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.files import is_folder, read_text
from trio_deploy.serve.openai.keys import API_KEY, with_environment

if TYPE_CHECKING:
    from trio_deploy.serve.fetch import ImageHosts
    from trio_deploy.serve.openai.app import Served
    from trio_deploy.serve.openai.gate import Doors
    from trio_deploy.serve.openai.process import ProcessOptions
    from trio_deploy.serve.openai.settings import Settings

SUMMARY = "Answer OpenAI's clients: an HTTP server."

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?")
_EVERY_ADDRESS = ("0.0.0.0", "::")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)"
    )
    command.add_argument(
        "--port", type=int, default=8000, help="port to listen at; 0: a free one (default: 8000)"
    )
    command.add_argument("--open", action="store_true", help="open the page in a browser")
    command.add_argument("--name", help="what clients call the model (default: as named here)")
    command.add_argument(
        "--settings", type=Path, metavar="YAML", help="file of limits, a name and value per line"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one limit, such as max_tokens=256; may be repeated",
    )
    _add_doors(command)
    _add_process(command)
    add_runtime_options(command)


def _add_doors(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("who may ask")
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"keys of which clients need one, one per line (or one in {API_KEY})",
    )
    group.add_argument(
        "--no-auth",
        action="store_true",
        help="ask for no key at another host than this machine, either",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="name by which clients reach the server, as in their URL, with any port or with one; "
        "may be repeated",
    )
    group.add_argument(
        "--allow-images-from",
        action="append",
        default=[],
        metavar="HOST",
        help="host whose pictures are fetched where a request names their https address; may be "
        "repeated (default: none)",
    )
    group.add_argument("--ssl-certfile", metavar="FILE", help="certificate, for https")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its key")


def _add_process(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how it ends and what it reports")
    group.add_argument(
        "--drain-s",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time for running answers to finish when it is stopped (default: 30)",
    )
    group.add_argument(
        "--drain-delay-s",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="time before that in which it still listens and /ready says no (default: 0)",
    )
    group.add_argument(
        "--metrics-prefix",
        default="trio_",
        metavar="TEXT",
        help="prefix of metrics that vLLM has, too, such as vllm: (default: trio_)",
    )


def run(args: argparse.Namespace) -> None:
    """Check everything that can be, open the model, then serve until a signal comes."""
    from trio_deploy.serve.fetch import ImageHosts
    from trio_deploy.serve.limits import read_settings
    from trio_deploy.serve.openai.process import bind, serve
    from trio_deploy.serve.openai.settings import Settings

    options = runtime_options(args)
    settings = Settings.parse(read_settings(args.settings, args.set))
    doors, process = doors_of(args), _process_options(args)
    images = ImageHosts.parse(args.allow_images_from)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("trio_deploy").setLevel(logging.INFO)
    with bind(args.host, args.port) as listener:
        served = _open(args, options, settings, doors, images)
        url = _url(args, listener)

        def listening() -> None:
            from trio_deploy.serve.openai.greeting import greeting

            say(greeting(served, url), flush=True)
            if args.open:  # in a thread, since some browsers return only when they end
                threading.Thread(target=open_page, args=(f"{url}/",), daemon=True).start()

        serve(served, listener, process, listening)


def open_page(url: str) -> None:
    """Open a page in a browser that has a window, or say where it is.

    A browser of the terminal would take it from the server.
    """
    windows = sys.platform in ("win32", "darwin")
    windows = windows or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if not (windows and webbrowser.open(url)):
        say(f"there is no browser here: open {url} where there is one", flush=True)


def _open(
    args: argparse.Namespace,
    options: RuntimeOptions,
    settings: Settings,
    doors: Doors,
    images: ImageHosts,
) -> Served:
    from trio_deploy.pipeline.pipeline import Pipeline
    from trio_deploy.serve.openai.app import Served
    from trio_deploy.serve.service import Service

    bundle = bundle_of(args, options, to_run=True, budgets=[settings.service.budget])
    pipeline = Pipeline.open(bundle, options)
    return Served(
        pipeline,
        Service(pipeline, settings.service),
        name=args.name or _name(args.bundle),
        limits=settings.http,
        doors=doors,
        images=images,
        metrics_prefix=args.metrics_prefix,
    )


def _name(bundle: str) -> str:
    """What a bundle or model is called where no name is given."""
    return Path(bundle).resolve().name if is_folder(Path(bundle)) else bundle


def doors_of(args: argparse.Namespace) -> Doors:
    """Who may ask, by the options.

    Raises:
        TrioError: another machine could ask without a key, and that is not said outright.
    """
    from trio_deploy.serve.openai.gate import Doors, digest_of

    keys = _keys(args)
    if not keys and not args.no_auth and args.host not in _LOOPBACK:
        raise TrioError(
            f"at --host {args.host} other machines can ask: name a file of keys with "
            f"--api-key-file, set {API_KEY}, or say --no-auth"
        )
    for name in args.allowed_host:
        if not _HOST.fullmatch(name):
            raise TrioError(
                f"--allowed-host {name!r:.100} is no name of a host: write what stands in a URL "
                "between // and the next /, such as trio.example.com or trio.example.com:8000"
            )
    hosts = {name.lower() for name in (args.host, f"[{args.host}]", *args.allowed_host)}
    return Doors([digest_of(key) for key in keys], hosts, any_address=args.host in _EVERY_ADDRESS)


def _keys(args: argparse.Namespace) -> list[str]:
    found: list[str] = []
    if args.api_key_file is not None:
        try:
            text = read_text(args.api_key_file, "write one key per line")
        except FileNotFoundError:
            raise TrioError(f"there is no file {args.api_key_file}: name one of keys") from None
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise TrioError(f"{args.api_key_file} has no key: write one per line")
    keys = with_environment(found)
    if keys and args.no_auth:
        raise TrioError("there are keys, and --no-auth asks for none: leave one out")
    return keys


def _process_options(args: argparse.Namespace) -> ProcessOptions:
    from trio_deploy.serve.openai.process import ProcessOptions

    for name in ("drain_s", "drain_delay_s"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= 0):
            raise TrioError(f"--{name.replace('_', '-')} must be 0 or more, got {value}")
    if (args.ssl_certfile is None) != (args.ssl_keyfile is None):
        raise TrioError("https needs both --ssl-certfile and --ssl-keyfile")
    for file in filter(None, (args.ssl_certfile, args.ssl_keyfile)):
        if not Path(file).is_file():
            raise TrioError(f"there is no file {file}: name a certificate and its key")
    return ProcessOptions(args.drain_s, args.drain_delay_s, args.ssl_certfile, args.ssl_keyfile)


def _url(args: argparse.Namespace, listener: socket.socket) -> str:
    host = "127.0.0.1" if args.host == "0.0.0.0" else "::1" if args.host == "::" else args.host
    host = f"[{host}]" if ":" in host else host
    scheme = "http" if args.ssl_certfile is None else "https"
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
