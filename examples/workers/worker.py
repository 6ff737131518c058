#!/usr/bin/env python3
"""An external worker of pg_redrive in Python, with psycopg 3 (Debian: python3-psycopg).

Usage: worker.py HANDLER; the database is that of PGHOST, PGPORT, PGUSER, PGDATABASE.  What it does with
an item is do_item(); the rest is the same for every worker.  SIGTERM: it ends after the claim it is in.
"""
import json
import signal
import sys
import time

import psycopg
from psycopg.rows import dict_row

HANDLER = sys.argv[1]
CLAIM = "SELECT * FROM redrive.claim(%s, max_items => 50, lease => '2 min', worker => 'worker.py', wait => '5 s')"
COMPLETE = "SELECT redrive.complete(%s, %s, ARRAY(SELECT o FROM jsonb_populate_recordset(NULL::redrive.outcome, %s::jsonb) AS o))"


def do_item(db, item):
    """The work: the square of n, stored in the database.  An exception is the end of this item only."""
    n = item["payload"].get("n") if isinstance(item["payload"], dict) else None
    if type(n) is not int:  # True would be an instance of it
        raise ValueError("n is not a number")
    db.execute("INSERT INTO conformance.done (batch_id, item_no, attempt, result) VALUES (%s, %s, %s, %s)",
               (item["batch_id"], item["item_no"], item["attempt"], n * n))


def outcome(item, error):
    """What an error means: the decision is the worker's."""
    if isinstance(error, ValueError):
        kind, code, message = "failed", "E-INPUT", str(error)
    else:
        code, message = error.sqlstate, error.diag.message_primary
        kind = "ignored" if code == "RD001" else "failed" if code[:2] in ("22", "23") else "retry"
    return {"item_no": item["item_no"], "outcome": kind, "code": code, "message": message}


def work(db):
    """Claim items, do them, and say what became of them, in one transaction with what they wrote."""
    items = db.execute(CLAIM, (HANDLER,)).fetchall()  # committed at once
    if not items:
        return
    claim = (items[0]["chunk_id"], items[0]["lease_token"])
    try:
        with db.transaction():
            exceptions = []
            for item in items:
                try:
                    with db.transaction():  # a savepoint
                        do_item(db, item)
                except (ValueError, psycopg.Error) as error:
                    if db.broken:
                        raise
                    exceptions.append(outcome(item, error))
            db.execute(COMPLETE, (*claim, json.dumps(exceptions)))
    except psycopg.Error as error:  # all is rolled back
        if not db.broken and error.sqlstate != "RD004":  # that is: too late, others do it
            db.execute("SELECT redrive.release(%s, %s)", claim)
        raise  # main() tells, and waits a moment: it may come again at once


def main():
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    while not stop:
        try:
            with psycopg.connect(autocommit=True, row_factory=dict_row, prepare_threshold=None) as db:  # for poolers
                while not stop:
                    work(db)
        except psycopg.Error as error:
            print(error, file=sys.stderr)
            time.sleep(1)


if __name__ == "__main__":
    main()
