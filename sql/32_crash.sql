-- Crashes: items that took the server down.

-- What the postmaster found in the file of crumbs when it started (crumbs.c),
-- for this database, until the supervisor has recorded it.
--   item, unlock  the handler, or on_unlock, of item "id" was executed when its process died
--   callback      callback "id" was
--   build         the build function of push "id"'s platform was
--   segment       the process died in or after several items, the last of which is "id"
--   innocent      the process was taken down because of another one
--   suspect       everything was killed, the postmaster too, while item "id" was executed
--   unknown       the file was lost
CREATE FUNCTION redrive._crumbs()
RETURNS TABLE (kind text, batch_id bigint, chunk_id bigint, lease_token bigint, id bigint, crashed_at timestamptz)
LANGUAGE c VOLATILE ROWS 10 AS 'MODULE_PATHNAME', 'redrive__crumbs';

-- One of the items of a batch from p_from to p_to may have crashed the server: have
-- each of them run alone, and if it does crash the server, count it twice.
-- p_chunk_id: a retry chunk, which has some of these items only.
CREATE FUNCTION redrive._suspect(p_batch_id bigint, p_from bigint, p_to bigint, p_chunk_id bigint, p_crashed_at timestamptz) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO redrive.crashes (batch_id, item_no, first_crashed_at, last_crashed_at)
    SELECT b.batch_id, i.item_no, $5, $5
    FROM redrive.batches AS b
    CROSS JOIN LATERAL (
        SELECT g FROM generate_series(greatest($2, 1), least($3, b.total)) AS g
        WHERE NOT EXISTS (SELECT FROM redrive.retry_lists AS l WHERE l.chunk_id = $4)
        UNION ALL
        SELECT u FROM redrive.retry_lists AS l CROSS JOIN LATERAL unnest(l.item_nos) AS u
        WHERE l.chunk_id = $4 AND u BETWEEN $2 AND $3
    ) AS i (item_no)
    WHERE b.batch_id = $1
    ORDER BY i.item_no
    LIMIT 2000 -- a commit interval has no more
    ON CONFLICT DO NOTHING
$$;

-- Turn the verdicts into rows; called before any chunk is taken from a lost worker.
-- Doing it again changes nothing: each crash has a time of its own.  A chunk
-- need not be there: a crash may have swallowed its claim.
-- Writes crashes, callbacks and platforms.
CREATE FUNCTION redrive._blame() RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    k record;
BEGIN
    FOR k IN SELECT * FROM redrive._crumbs() AS x WHERE x.kind <> 'innocent' ORDER BY x.crashed_at LOOP
        CASE k.kind
            WHEN 'callback' THEN
                UPDATE redrive.callbacks AS x
                SET crash_count = x.crash_count + 1, last_crashed_at = k.crashed_at, failures = x.failures + 1,
                    message = 'the callback crashed the server',
                    next_attempt_at = CASE WHEN x.crash_count = 0 THEN clock_timestamp() END
                WHERE x.callback_id = k.id AND (x.last_crashed_at IS NULL OR x.last_crashed_at < k.crashed_at);
            WHEN 'build' THEN
                -- until somebody has mended the function, and resumes the platform
                UPDATE redrive.platforms AS p SET paused = true
                FROM redrive.pushes AS u
                WHERE u.push_id = k.id AND p.platform_id = u.platform_id;
                UPDATE redrive.platform_states AS s SET reason = 'its build function crashed the server'
                FROM redrive.pushes AS u
                WHERE u.push_id = k.id AND s.platform_id = u.platform_id;
                UPDATE redrive.pushes AS u SET failed_at = k.crashed_at, error_class = 'build', message = 'The build function crashed the server.'
                WHERE u.push_id = k.id;
            WHEN 'segment' THEN
                PERFORM redrive._suspect(k.batch_id, coalesce((SELECT c.done_to + 1 FROM redrive.chunks AS c WHERE c.chunk_id = k.chunk_id), k.id - 1999),
                    k.id, k.chunk_id, k.crashed_at);
            WHEN 'suspect' THEN
                PERFORM redrive._suspect(k.batch_id, k.id, k.id, NULL, k.crashed_at);
            WHEN 'unknown' THEN
                PERFORM redrive._suspect(c.batch_id, c.done_to + 1, c.to_no, c.chunk_id, k.crashed_at)
                FROM redrive.chunks AS c
                WHERE c.state = 'running' AND c.worker_pid IS NOT NULL AND c.claimed_at < k.crashed_at;
                -- the claim of a small batch just sent may be lost too
                PERFORM redrive._suspect(b.batch_id, 1, b.total, NULL, k.crashed_at)
                FROM redrive.batches AS b
                JOIN redrive.handlers AS h ON h.handler_id = b.handler_id AND h.kind <> 'external'
                WHERE b.claimable AND b.claimed_to = 0 AND b.total <= 100 AND b.sealed_at BETWEEN k.crashed_at - interval '1 min' AND k.crashed_at
                  AND b.serve_after <= k.crashed_at; -- by index: this is asked until the next restart
            ELSE
                INSERT INTO redrive.crashes AS x (batch_id, item_no, crash_count, first_crashed_at, last_crashed_at)
                SELECT b.batch_id, k.id, 1, k.crashed_at, k.crashed_at
                FROM redrive.batches AS b
                WHERE b.batch_id = k.batch_id AND k.id BETWEEN 1 AND b.total
                ON CONFLICT ON CONSTRAINT crashes_pkey DO UPDATE
                SET crash_count = greatest(x.crash_count, 1) + 1, last_crashed_at = k.crashed_at
                WHERE x.last_crashed_at < k.crashed_at;
        END CASE;
    END LOOP;
END
$$;
