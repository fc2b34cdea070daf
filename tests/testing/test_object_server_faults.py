"""What goes wrong on the server for tests, where, and how often: as told, and not otherwise."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.client
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from milepost.testing.objects import Condition, ObjectServer, RefusedError, Rule, Window
from testing.asking import Client

md5 = functools.partial(hashlib.md5, usedforsecurity=False)
GCS = "/storage/v1/b/bucket/o"
UPLOAD = "/upload/storage/v1/b/bucket/o?uploadType=media&name="
LOST = (http.client.RemoteDisconnected, ConnectionResetError)

WRITER = """
import http.client, sys
sys.stdin.readline()
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
for number in range(1, 6):
    connection.request("PUT", f"/bucket/{number}", b"data")
    connection.getresponse().read()
"""


@pytest.fixture
def client(server):
    return Client(server.url)


@pytest.fixture(params=["s3", "gcs"])
def put(request, client):
    """Return what writes an object by one of the protocols."""
    if request.param == "s3":
        return lambda key, body=b"data": client.put(f"/bucket/{key}", body)
    return lambda key, body=b"data": client.post(f"{UPLOAD}{key}", body)


@pytest.fixture
def writer(server):
    """Return a process that will write the keys 1 to 5, once it is told to."""
    port = server.url.rpartition(":")[2]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, port], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        yield process
        process.kill()


def in_background(act):
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def arrived(rule):
    assert rule.reached.wait(30)


# --- the book --------------------------------------------------------------------------------------------------------


def test_every_request_is_in_the_book(server, client):
    client.put("/bucket/a%20b", b"data")
    client.get("/bucket/a%20b?x=y")
    client.get("/bucket/none")
    seen = [(each.number, each.method, each.path, each.kind, each.key, each.mutating) for each in server.requests]
    assert seen == [
        (1, "PUT", "/bucket/a b", "put", "a b", True),
        (2, "GET", "/bucket/a b", "get", "a b", False),
        (3, "GET", "/bucket/none", "get", "none", False),
    ]
    assert [(each.status, each.bytes_in) for each in server.requests] == [(200, 4), (200, 0), (404, 0)]
    assert server.requests[1].bytes_out == 4
    assert server.requests[1].query == {"x": "y"}
    assert server.mutations == 1


def test_a_book_that_is_forgotten_begins_with_one(server, client):
    client.put("/bucket/a")
    server.forget()
    assert (server.requests, server.mutations) == ([], 0)
    client.put("/bucket/b")
    assert [(each.number, each.key) for each in server.requests] == [(1, "b")]


@pytest.mark.parametrize(
    ("method", "path", "kind", "named"),
    [
        ("GET", "/bucket?list-type=2", "list", "/bucket"),
        ("HEAD", "/bucket", "bucket", "/bucket"),
        ("GET", "/bucket?location", "bucket", "/bucket"),
        ("GET", "/bucket?uploads", "list_uploads", "/bucket"),
        ("POST", "/bucket?delete", "delete_many", "/bucket"),
        ("POST", "/bucket/k?uploads", "create_upload", "/bucket/k"),
        ("PUT", "/bucket/k?uploadId=1&partNumber=1", "upload_part", "/bucket/k"),
        ("POST", "/bucket/k?uploadId=1", "complete_upload", "/bucket/k"),
        ("GET", "/bucket/k?uploadId=1", "list_parts", "/bucket/k"),
        ("DELETE", "/bucket/k?uploadId=1", "abort_upload", "/bucket/k"),
        ("HEAD", "/bucket/k", "head", "/bucket/k"),
        ("DELETE", "/bucket/k", "delete", "/bucket/k"),
        ("GET", GCS, "list", "/bucket"),
        ("GET", f"{GCS}/k%2Fl", "head", "/bucket/k/l"),
        ("GET", f"{GCS}/k?alt=media", "get", "/bucket/k"),
        ("GET", f"/download{GCS}/k", "get", "/bucket/k"),
        ("DELETE", f"{GCS}/k", "delete", "/bucket/k"),
        ("POST", f"{UPLOAD}k", "put", "/bucket/k"),
        ("POST", UPLOAD.replace("media", "resumable") + "k", "start_resumable", "/bucket/k"),
        ("POST", f"{GCS}/j/rewriteTo/b/bucket/o/k", "copy", "/bucket/k"),
        ("GET", "/storage/v1/b/bucket", "bucket", "/bucket"),
        ("POST", "/batch/storage/v1", "delete_many", "/"),
    ],
)
def test_requests_are_called_by_what_they_ask_for(server, client, method, path, kind, named):
    client.ask(method, path)
    assert [(each.kind, each.path) for each in server.requests] == [(kind, named)]
    assert server.mutations == (method not in {"GET", "HEAD"})


def test_a_request_is_in_the_book_before_it_is_answered(server, client):
    rule = server.rule("hold")
    thread = in_background(lambda: client.put("/bucket/a"))
    arrived(rule)
    assert [(each.key, each.status) for each in server.requests] == [("a", 0)]
    rule.release()
    thread.join()
    assert [(each.key, each.status) for each in server.requests] == [("a", 200)]


def test_another_process_can_ask_for_the_count(server, client):
    client.put("/bucket/a")
    for _ in range(2):
        assert client.get("/_count").body == b"1"


# --- which requests --------------------------------------------------------------------------------------------------


def struck(server, client, **words):
    server.rule("status", **words)
    asked = [
        ("PUT", "a"),
        ("PUT", "b/a"),
        ("GET", "a"),
        ("GET", "b/a"),
        ("PUT", "b/c"),
        ("DELETE", "a"),
        ("GET", "b/c"),
    ]
    answers = [client.ask(method, f"/bucket/{key}") for method, key in asked]
    server.clear_rules()
    return [at for at, answer in enumerate(answers) if answer.status == 503]


@pytest.mark.parametrize(
    ("words", "which"),
    [
        ({}, [0]),
        ({"times": 2}, [0, 1]),
        ({"times": None}, [0, 1, 2, 3, 4, 5, 6]),
        ({"nth": 4}, [3]),
        ({"nth": 4, "times": 2}, [3, 4]),
        ({"nth": 6, "times": None}, [5, 6]),
        ({"mutating": True, "nth": 3}, [4]),
        ({"mutating": False, "times": None}, [2, 3, 6]),
        ({"method": "GET", "nth": 2}, [3]),
        ({"kind": "delete"}, [5]),
        ({"key": "^b/", "times": None}, [1, 3, 4, 6]),
        ({"key": "c$", "method": "GET"}, [6]),
        ({"kind": "list", "times": None}, []),
    ],
)
def test_a_rule_strikes_what_it_says_and_as_often(server, client, words, which):
    assert struck(server, client, **words) == which


def test_every_rule_counts_and_the_first_strikes(server, client):
    server.rule("status", status=500, nth=2)
    server.rule("status", status=503, nth=2, times=2)
    assert [client.put("/bucket/a").status for _ in range(5)] == [200, 500, 503, 503, 200]


def test_without_rules_nothing_goes_wrong_any_more(server, client):
    server.rule("status", times=None)
    assert client.put("/bucket/a").status == 503
    server.clear_rules()
    assert client.put("/bucket/a").status == 200


def test_a_rule_that_cannot_be_followed_is_refused(server):
    with pytest.raises(ValueError, match="cannot do 'explode': a rule does one of cut, delay"):
        server.rule("explode")
    with pytest.raises(ValueError, match="cannot kill process 0"):
        Rule("kill_before")


# --- what happens ----------------------------------------------------------------------------------------------------


def test_a_status_is_told_and_nothing_is_done(server, client, put):
    server.rule("status", status=503, code="SlowDown", retry_after=2)
    answer = put("a")
    assert (answer.status, answer.headers["retry-after"], server.store.keys("bucket")) == (503, "2", [])
    assert put("a").status == 200


def test_a_status_has_its_code(server, client):
    server.rule("status", status=409)
    server.rule("status", status=400, code="RequestTimeout")
    assert [client.put("/bucket/a").code for _ in range(2)] == ["ConditionalRequestConflict", "RequestTimeout"]
    server.rule("status", status=429)
    assert client.get(f"{GCS}/a").json["error"]["errors"][0]["reason"] == "rateLimitExceeded"


@pytest.mark.parametrize(("action", "keys"), [("drop_before", []), ("drop_after", ["a"])])
def test_a_reply_is_lost_before_or_after_acting(server, put, action, keys):
    server.rule(action)
    with pytest.raises(LOST):
        put("a")
    assert server.store.keys("bucket") == keys
    assert [each.status for each in server.requests] == [0]
    assert put("b").status == 200


def test_half_of_a_body_comes(server, client):
    client.put("/bucket/a", b"0123456789")
    server.rule("cut")
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.get("/bucket/a")
    assert (caught.value.partial, caught.value.expected) == (b"01234", 5)
    assert server.requests[-1].bytes_out == 5
    assert client.get("/bucket/a").body == b"0123456789"


def test_where_there_is_no_body_half_of_the_headers_comes(server, client):
    server.rule("cut")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 30) as sock:
        sock.sendall(b"PUT /bucket/a HTTP/1.1\r\nContent-Length: 4\r\n\r\ndata")
        told = b"".join(iter(lambda: sock.recv(100), b""))
    assert told.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\n" not in told
    assert server.store.keys("bucket") == ["a"]


def test_a_delay_ends_by_itself(server, client):
    server.rule("delay", seconds=0.05)
    began = time.monotonic()
    assert client.put("/bucket/a").status == 200
    assert time.monotonic() - began >= 0.05


def test_a_delay_ends_when_it_is_released(server, client):
    rule = server.rule("delay", seconds=600)
    thread = in_background(lambda: client.put("/bucket/a"))
    arrived(rule)
    assert server.store.keys("bucket") == []
    rule.release()
    thread.join()
    assert server.store.keys("bucket") == ["a"]


@pytest.mark.parametrize("action", ["hold", "hold_after"])
def test_a_request_is_held_before_or_after_acting(server, client, action):
    rule = server.rule(action)
    answers = []
    thread = in_background(lambda: answers.append(client.put("/bucket/a").status))
    arrived(rule)
    assert (answers, server.store.keys("bucket")) == ([], [] if action == "hold" else ["a"])
    assert client.put("/bucket/b").status == 200
    rule.release()
    thread.join()
    assert (answers, server.store.keys("bucket")) == ([200], ["a", "b"])


@pytest.mark.parametrize("end", ["release", "clear", "stop"])
def test_a_stall_ends_without_answer_and_without_acting(server, client, end):
    rule = server.rule("stall")
    errors = []

    def ask():
        try:
            client.put("/bucket/a")
        except LOST as error:
            errors.append(error)

    thread = in_background(ask)
    arrived(rule)
    {"release": rule.release, "clear": server.clear_rules, "stop": server.stop}[end]()
    thread.join()
    server.stop()
    assert len(errors) == 1
    assert server.store.keys("bucket") == []


@pytest.mark.parametrize("action", ["hold", "delay"])
def test_what_is_held_when_rules_are_cleared_never_happens(server, client, action):
    rule = server.rule(action, seconds=600)
    errors = []

    def ask():
        try:
            client.put("/bucket/a")
        except LOST as error:
            errors.append(error)

    thread = in_background(ask)
    arrived(rule)
    server.clear_rules()
    rule.release()
    thread.join()
    server.stop()
    assert len(errors) == 1
    assert server.store.keys("bucket") == []


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "keys"), [("kill_before", ["1", "2"]), ("kill_after", ["1", "2", "3"])])
def test_a_process_is_killed_before_or_after_its_third_change(server, writer, action, keys):
    rule = server.rule(action, pid=writer.pid, mutating=True, nth=3)
    writer.communicate(b"\n", 30)
    assert writer.returncode == -signal.SIGKILL
    assert rule.reached.is_set()
    assert server.store.keys("bucket") == keys


def test_a_process_that_is_not_reached_lives(server, writer):
    rule = server.rule("kill_before", pid=writer.pid, nth=6)
    writer.communicate(b"\n", 30)
    assert (writer.returncode, rule.reached.is_set()) == (0, False)
    assert server.store.keys("bucket") == ["1", "2", "3", "4", "5"]


def test_after_a_kill_nobody_is_answered_until_it_thaws(server, client, writer):
    server.rule("kill_before", pid=writer.pid)
    writer.communicate(b"\n", 30)
    with pytest.raises(LOST):
        client.put("/bucket/a")
    assert server.store.keys("bucket") == []
    assert len(server.requests) == 1
    server.thaw()
    server.thaw()
    assert client.put("/bucket/a").status == 200


def told_to(sock, data):
    try:
        sock.sendall(data)
        return sock.recv(100)
    except OSError:
        return b""


def test_what_was_asked_before_a_thaw_never_happens(server, client, writer):
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    asked = b"PUT /bucket/late HTTP/1.1\r\nContent-Length: 4\r\n\r\nda"
    with socket.create_connection(address, 30) as early, socket.create_connection(address, 30) as late:
        early.sendall(asked)
        server.rule("kill_before", pid=writer.pid)
        writer.communicate(b"\n", 30)
        late.sendall(asked + b"ta")
        with socket.create_connection(address, 30) as frozen:
            server.thaw()
            for sock, rest in ((early, b"ta"), (late, b""), (frozen, asked + b"ta")):
                assert told_to(sock, rest) == b""
    assert client.put("/bucket/a").status == 200
    assert server.store.keys("bucket") == ["a"]


def test_what_is_held_during_a_kill_never_happens(server, client, writer):
    held = server.rule("hold", key="held")
    server.rule("kill_before", pid=writer.pid, key="^[1-5]$")
    errors = []

    def ask():
        try:
            client.put("/bucket/held")
        except LOST as error:
            errors.append(error)

    thread = in_background(ask)
    arrived(held)
    writer.communicate(b"\n", 30)
    server.thaw()
    held.release()
    thread.join()
    server.stop()  # waits for whoever still acts
    assert len(errors) == 1
    assert server.store.keys("bucket") == []


def test_who_acts_is_waited_for_before_a_kill(server, client, writer, monkeypatch):
    inside, go = threading.Event(), threading.Event()
    really = server.store.put

    def put(*words, **options):
        inside.set()
        assert go.wait(30)
        return really(*words, **options)

    monkeypatch.setattr(server.store, "put", put)
    errors = []

    def ask():
        try:
            client.put("/bucket/a")
        except LOST as error:
            errors.append(error)

    thread = in_background(ask)
    assert inside.wait(30)
    killing = server.rule("kill_before", pid=writer.pid)
    writer.stdin.write(b"\n")
    writer.stdin.flush()
    arrived(killing)
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(0.1)
    go.set()
    assert writer.wait(30) == -signal.SIGKILL
    assert server.store.keys("bucket") == ["a"]
    thread.join()


# --- one of a batch --------------------------------------------------------------------------------------------------


def test_one_deletion_of_a_batch_can_fail(server, client):
    for key in "abc":
        server.store.put("bucket", key, b"")
    server.rule("status", kind="delete_each", key="b", status=503)
    body = b"<Delete>%b</Delete>" % b"".join(b"<Object><Key>%c</Key></Object>" % each for each in b"abc")
    answer = client.post("/bucket?delete", body, Content_MD5=base64.b64encode(md5(body).digest()).decode())
    assert answer.texts("Deleted", "Key") == ["a", "c"]
    assert answer.texts("Error", "Key") + answer.texts("Error", "Code") == ["b", "SlowDown"]
    assert server.store.keys("bucket") == ["b"]
    assert [each.kind for each in server.requests] == ["delete_many"]


def test_one_act_of_a_batch_can_fail(server, client):
    for key in "ab":
        server.store.put("bucket", key, b"")
    server.rule("status", kind="delete_each", nth=2, status=429)
    acts = "".join(
        f"--x\r\nContent-Type: application/http\r\n\r\nDELETE {GCS}/{each} HTTP/1.1\r\n\r\n" for each in "ab"
    )
    answer = client.post("/batch/storage/v1", f"{acts}--x--".encode(), Content_Type="multipart/mixed; boundary=x")
    assert [part[:3] for part in answer.body.split(b"HTTP/1.1 ")[1:]] == [b"204", b"429"]
    assert server.store.keys("bucket") == ["b"]


def test_a_rule_for_all_does_not_count_the_deletions_of_a_batch(server, client):
    server.rule("status", nth=2)
    acts = "".join(
        f"--x\r\nContent-Type: application/http\r\n\r\nDELETE {GCS}/{each} HTTP/1.1\r\n\r\n" for each in "ab"
    )
    for status in (200, 503):
        answer = client.post("/batch/storage/v1", f"{acts}--x--".encode(), Content_Type="multipart/mixed; boundary=x")
        assert answer.status == status


# --- what a server permits, and what it does badly ------------------------------------------------------------------


def test_only_what_is_permitted_passes(server, client):
    server.only(frozenset({"put", "get"}))
    assert client.put("/bucket/a", b"data").status == 200
    assert client.get("/bucket/a").body == b"data"
    refused = client.delete("/bucket/a")
    assert (refused.status, refused.code) == (403, "AccessDenied")
    assert client.get(GCS).status == 403
    assert server.store.keys("bucket") == ["a"]
    server.only()
    assert client.delete("/bucket/a").status == 204


def test_a_weak_store_judges_no_condition(server, client):
    client.put("/bucket/a", b"first")
    server.weak = frozenset({"if-none-match"})
    assert client.put("/bucket/a", b"second", If_None_Match="*").status == 200
    assert client.post(f"{UPLOAD}a&ifGenerationMatch=0", b"third").status == 200
    assert client.put("/bucket/a", b"lost", If_Match='"0123"').status == 412
    server.weak = frozenset({"if-match"})
    assert client.put("/bucket/a", b"lost", If_None_Match="*").status == 412
    assert client.put("/bucket/a", b"fourth", If_Match='"0123"').status == 200
    assert client.post(f"{UPLOAD}a&ifGenerationMatch=1", b"fifth").status == 200
    assert client.delete("/bucket/a", If_Match='"0123"').status == 204
    server.weak = frozenset()
    client.put("/bucket/a", b"first")
    assert client.put("/bucket/a", b"lost", If_None_Match="*").status == 412


def test_a_store_can_list_what_was_there(server, client):
    client.put("/bucket/old")
    server.weak = frozenset({"list"})
    client.put("/bucket/new")
    assert client.get("/bucket?list-type=2").texts("Contents", "Key") == ["old"]
    client.delete("/bucket/old")
    assert client.get("/bucket?list-type=2").texts("Contents") == []
    assert client.get("/bucket/new").status == 200
    server.weak = frozenset()
    assert client.get("/bucket?list-type=2").texts("Contents", "Key") == ["new"]


def test_a_clock_can_be_wrong(server, client):
    from email.utils import parsedate_to_datetime

    server.store.skew = -7200.0
    told = parsedate_to_datetime(client.put("/bucket/a").headers["date"]).timestamp()
    assert abs(time.time() - 7200 - told) < 60


@pytest.mark.parametrize("verb", ["put", "delete"])
def test_between_judging_and_acting_there_is_nobody_else(server, verb):
    judging, go = threading.Event(), threading.Event()

    stored = server.store.put("bucket", "a", b"first")

    class Slow:
        etag = stored.etag
        generation = None

        @property
        def absent(self):
            judging.set()
            return not go.wait(30)

    slow = Slow()
    first = in_background(lambda: server.store.put("bucket", "a", b"second", condition=slow))
    assert judging.wait(30)
    lost = []

    def other():
        stale = Condition(etag=stored.etag)
        try:
            if verb == "delete":
                server.store.delete("bucket", "a", stale)
            else:
                server.store.put("bucket", "a", b"lost", condition=stale)
        except RefusedError as error:
            lost.append(error.status)

    second = in_background(other)
    second.join(0.1)  # it is not done, because it waits
    go.set()
    first.join()
    second.join()
    assert (lost, server.store.get("bucket", "a")) == ([412], b"second")


def test_headers_that_are_cut_short_are_no_request(server):
    server.store.put("bucket", "a", b"data")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 30) as sock:
        sock.sendall(b"DELETE /bucket/a HTTP/1.1\r\nIf-Match: no")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""
    assert (server.store.keys("bucket"), server.requests) == (["a"], [])


# --- the oracle ------------------------------------------------------------------------------------------------------


def test_the_store_is_seen_without_any_client(server, client):
    server.store.put("bucket", "b", b"data")
    client.put("/bucket/a", b"other")
    assert (server.store.get("bucket", "a"), client.get("/bucket/b").body) == (b"other", b"data")
    assert (server.store.keys("bucket"), server.store.keys("bucket", "b")) == (["a", "b"], ["b"])
    assert [server.store.delete("bucket", "a"), server.store.delete("bucket", "a")] == [True, False]
    with pytest.raises(KeyError, match="there is no object 'a'"):
        server.store.get("bucket", "a")
    client.post("/bucket/c?uploads")
    assert [each.key for each in server.store.uploads("bucket")] == ["c"]
    server.store.clear()
    assert (server.store.keys("bucket"), server.store.uploads("bucket")) == ([], [])
    assert server.requests[0].number == 1


def test_pages_of_a_store_are_what_a_look_at_all_keys_says(server):
    names = ["a", "a/", "a/b", "a/b/c", "a0", "b", "b//", "b/\U0010ffff", "c/d", "\ud7ff", "\ue000/x", "\U00010000"]
    for name in names:
        server.store.put("bucket", name, b"")
    for prefix in ("", "a", "a/", "b", "c/d", "z"):
        for limit in (1, 2, 100):
            found, start = [], ""
            while start is not None:
                page = server.store.page("bucket", Window(prefix, "/", start, limit=limit))
                assert len(page.objects) + len(page.prefixes) <= limit
                found += [*(key for key, _ in page.objects), *page.prefixes]
                start = page.more
            rest = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
            folded = {prefix + tail.partition("/")[0] + "/" if "/" in tail else name for name, tail in rest.items()}
            assert sorted(found) == sorted(folded)


def test_a_server_that_is_stopped_is_gone_and_can_be_stopped_again():
    with ObjectServer(buckets=("one", "two")) as server:
        client = Client(server.url)
        assert [client.put(f"/{each}/a").status for each in ("one", "two", "three")] == [200, 200, 404]
        server.stop()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        client.put("/one/a")


def test_a_process_of_its_own_serves():
    command = [sys.executable, "-m", "milepost.testing.objects", "--bucket", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert Client(process.stdout.readline().strip()).put("/mine/a", b"data").status == 200
        finally:
            process.terminate()


def test_connections_go_on_and_requests_follow_one_another(server):
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]))
    for number in range(3):
        connection.request("PUT", f"/bucket/{number}", iter([b"da", b"ta"]), encode_chunked=True)
        connection.getresponse().read()
        sock = connection.sock
        connection.request("GET", f"/bucket/{number}")
        assert connection.getresponse().read() == b"data"
        assert connection.sock is sock
    connection.close()
