"""The metrics worker: has a listening socket and the latest figures, and nothing else.

It asks nobody. The supervisor tells it the figures about once a second; who asks for metrics in between gets
the same again. No connection depends on it.
"""

import asyncio
import logging
import os
import socket

from ipc.messages import AnyMessage, ConfigureMetrics, MetricsSnapshot
from workers.metrics.http_answer import Answer, answer
from workers.metrics.page import Page
from workers.metrics.server import CLIENT_SECONDS, MetricsServer
from workers.runtime import Runtime

log = logging.getLogger(__name__)


async def main(runtime: Runtime[ConfigureMetrics]) -> None:
    """Serves the socket in `runtime.descriptors` until the runtime stops or drains."""
    page = Page()
    names = {"localhost", os.uname().nodename.lower()}

    def answer_request(head: bytes) -> Answer:
        return answer(head, names, page.render)

    def on_message(message: AnyMessage, _descriptors: list[int]) -> None:
        if isinstance(message, MetricsSnapshot):
            page.use(message)
            page_is_there.set()

    page_is_there = asyncio.Event()
    runtime.on_message = on_message
    [descriptor] = runtime.descriptors
    server = MetricsServer(socket.socket(fileno=descriptor), answer_request, runtime.counters)

    async def work() -> None:
        await page_is_there.wait()
        await runtime.taken_over()
        await server.start()
        runtime.ready()
        log.info("serving metrics")
        await runtime.draining.wait()
        server.stop_accepting()
        runtime.handed_over()
        await server.finish(min(CLIENT_SECONDS, runtime.drain_seconds))

    try:
        await runtime.until_stopped(work())
    finally:
        server.stop_accepting()
        await server.finish(0)
