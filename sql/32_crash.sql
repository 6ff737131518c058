-- Crashes: items that took the server down.

-- What the postmaster found in the file of crumbs when it started (crumbs.c),
-- for this database, until the supervisor has recorded it.
--   item, unlock  the handler, or on_unlock, of item "id" was executed when its process died
--   callback      callback "id" was
--   segment       the process died after several items, the last of which is "id"
--   innocent      the process was taken down because of another one
--   suspect       everything was killed, the postmaster too, while item "id" was executed
--   unknown       the file was lost
CREATE FUNCTION redrive._crumbs()
RETURNS TABLE (kind text, batch_id bigint, chunk_id bigint, lease_token bigint, id bigint, crashed_at timestamptz)
LANGUAGE c VOLATILE ROWS 10 AS 'MODULE_PATHNAME', 'redrive__crumbs';

-- Turn these verdicts into rows; called before any chunk is taken from a lost
-- worker.  Doing it again changes nothing: each crash has a time of its own.
-- Writes crashes, callbacks and chunks.suspect_to; what is not certain makes the
-- items run one by one, and one that crashes the server then counts twice.
CREATE FUNCTION redrive._blame() RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    k record;
BEGIN
    FOR k IN SELECT * FROM redrive._crumbs() AS x WHERE x.kind <> 'innocent' ORDER BY x.crashed_at LOOP
        CASE
            WHEN k.kind IN ('item', 'unlock') THEN
                INSERT INTO redrive.crashes AS x (batch_id, item_no, crash_count, first_crashed_at, last_crashed_at)
                SELECT b.batch_id, k.id,
                    1 + (EXISTS (SELECT FROM redrive.chunks AS c WHERE c.chunk_id = k.chunk_id AND c.suspect_to >= k.id)
                         OR EXISTS (SELECT FROM redrive.crashes AS y WHERE y.batch_id = k.batch_id AND y.item_no = 0))::int,
                    k.crashed_at, k.crashed_at
                FROM redrive.batches AS b
                WHERE b.batch_id = k.batch_id AND k.id BETWEEN 1 AND b.total
                ON CONFLICT ON CONSTRAINT crashes_pkey DO UPDATE
                SET crash_count = x.crash_count + EXCLUDED.crash_count, last_crashed_at = EXCLUDED.last_crashed_at
                WHERE x.last_crashed_at < EXCLUDED.last_crashed_at;
            WHEN k.kind = 'callback' THEN
                UPDATE redrive.callbacks AS x
                SET crash_count = x.crash_count + 1, last_crashed_at = k.crashed_at, failures = x.failures + 1,
                    message = 'the callback crashed the server',
                    next_attempt_at = CASE WHEN x.crash_count = 0 THEN clock_timestamp() END
                WHERE x.callback_id = k.id AND (x.last_crashed_at IS NULL OR x.last_crashed_at < k.crashed_at);
            WHEN k.kind IN ('segment', 'suspect') THEN
                UPDATE redrive.chunks AS c
                SET suspect_to = greatest(c.suspect_to, least(k.id, c.to_no))
                WHERE c.chunk_id = k.chunk_id AND c.lease_token = k.lease_token AND c.state = 'running';
            ELSE
                -- a commit interval has at most 2000 items
                UPDATE redrive.chunks AS c
                SET suspect_to = greatest(c.suspect_to, CASE c.kind WHEN 'first' THEN least(c.done_to + 2000, c.to_no) ELSE c.to_no END)
                WHERE c.state = 'running' AND c.claimed_at < k.crashed_at;
                -- the claim of a batch just sent may be lost too: any of its items
                INSERT INTO redrive.crashes (batch_id, item_no, crash_count, first_crashed_at, last_crashed_at)
                SELECT b.batch_id, 0, 0, k.crashed_at, k.crashed_at
                FROM redrive.batches AS b
                WHERE b.claimable AND b.claimed_to = 0 AND b.total <= 100 AND b.sealed_at > k.crashed_at - interval '1 min'
                ON CONFLICT DO NOTHING;
        END CASE;
    END LOOP;
END
$$;
