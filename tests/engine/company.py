"""Requests that come and go in a random order, for tests of what they do to each other."""


def run_in_random_company(engine, requests, draw):
    """What each request that nobody aborted gave: its place in ``requests`` to its token ids.

    Args:
        engine: without requests.
        requests: prompt, sampling and mode of each.
        draw: random numbers, for when requests come and which are aborted.

    Returns:
        The token ids of the continuations of each finished request, and the places of the aborted.
    """
    waiting, found, aborted, places = list(enumerate(requests)), {}, set(), {}
    while waiting or engine.has_unfinished():
        while waiting and draw.random() < 0.3:
            place, request = waiting.pop()
            places[engine.add_request(*request)] = place
        if places and draw.random() < 0.03:
            name = draw.choice(list(places))
            if engine.abort(name) is not None:
                aborted.add(places[name])
        for output in engine.step():
            if output.finished:
                found[places[output.request_id]] = [c.token_ids for c in output.outputs]
        engine._scheduler.check_integrity()
    return found, aborted
