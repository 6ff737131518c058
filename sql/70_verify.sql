-- Verify: prove the counters of a batch from its rows.

CREATE TYPE redrive.check_result AS (batch_id bigint, check_name text, expected bigint, actual bigint, ok boolean);
COMMENT ON TYPE redrive.check_result IS 'One check of redrive.verify(): what the rows say, what the counter says, and whether they agree';

-- All checks of all batches the current user may see; true at every commit.
CREATE VIEW redrive._verify WITH (security_barrier) AS
SELECT b.batch_id, r.check_name, r.expected, r.actual
FROM redrive._batches AS b
JOIN redrive._visible AS v ON v.handler_id = b.handler_id
LEFT JOIN (SELECT l.batch_id, count(*) AS locks FROM redrive.locks AS l GROUP BY l.batch_id) AS k ON k.batch_id = b.batch_id
CROSS JOIN LATERAL (
    SELECT coalesce(sum(i.items), 0) AS items, coalesce(max(i.first_no + i.items - 1), 0) AS last_no
    FROM redrive.item_blocks AS i
    WHERE i.part = b.part AND i.batch_id = b.batch_id
) AS i
CROSS JOIN LATERAL (
    SELECT count(*) AS all_states,
        count(*) FILTER (WHERE f.state = 'waiting') AS waiting,
        count(*) FILTER (WHERE f.state = 'failed') AS failed,
        count(*) FILTER (WHERE f.state = 'ignored') AS ignored,
        count(*) FILTER (WHERE f.state = 'cancelled') AS cancelled,
        count(f.key) FILTER (WHERE f.state = 'waiting') AS keyed
    FROM redrive.failures AS f
    WHERE f.part = b.part AND f.batch_id = b.batch_id
) AS f
CROSS JOIN LATERAL (
    SELECT count(*) AS items,
        count(*) FILTER (WHERE b.keyed AND (
            SELECT x.keys[y.item_no - x.first_no + 1]
            FROM redrive.item_blocks AS x
            WHERE x.part = b.part AND x.batch_id = b.batch_id AND x.first_no <= y.item_no
            ORDER BY x.first_no DESC
            LIMIT 1) IS NOT NULL) AS keyed
    FROM redrive._retrying AS y
    WHERE y.batch_id = b.batch_id
) AS y
CROSS JOIN LATERAL (
    -- covered: items in some first chunk that were not cancelled in it; overlap: items in two of them
    SELECT coalesce(sum(c.to_no - greatest(c.from_no, c.seen_to + 1) + 1) FILTER (WHERE c.kind = 'first' AND c.to_no > c.seen_to), 0)
            - coalesce(sum(c.to_no - c.done_to - c.settled) FILTER (WHERE c.kind = 'first' AND c.state = 'done'), 0) AS covered,
        coalesce(sum(least(c.to_no, c.seen_to) - c.from_no + 1) FILTER (WHERE c.kind = 'first' AND c.from_no <= least(c.to_no, c.seen_to)), 0) AS overlap,
        coalesce(sum(c.done) FILTER (WHERE c.kind = 'first'), 0) AS done,
        coalesce(sum(c.done_to - c.from_no + 1 + c.settled) FILTER (WHERE c.kind = 'first'), 0) AS done_to,
        coalesce(sum(c.items - c.done) FILTER (WHERE c.kind = 'retry' AND c.state <> 'done'), 0) AS retrying,
        count(*) AS chunks
    FROM (
        SELECT h.kind, h.state, h.from_no, h.to_no, h.done_to, h.items, h.done,
            coalesce((SELECT sum(upper(r) - lower(r)) FROM unnest(h.settled) AS r), 0) AS settled,
            coalesce(max(h.to_no) FILTER (WHERE h.kind = 'first') OVER (ORDER BY h.from_no, h.chunk_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS seen_to
        FROM redrive.chunks AS h
        WHERE h.batch_id = b.batch_id
    ) AS c
) AS c
CROSS JOIN LATERAL (
    SELECT 'total' AS check_name, b.total AS expected,
        b.succeeded + b.ignored + b.failed + b.cancelled + b.waiting + b.running + b.pending AS actual
    UNION ALL
    SELECT 'items', b.total, i.items
    UNION ALL
    SELECT 'item numbers', b.total, i.last_no
    UNION ALL
    SELECT 'succeeded', c.done - f.all_states - y.items, b.succeeded
    UNION ALL
    SELECT 'ignored', f.ignored, b.ignored
    UNION ALL
    SELECT 'failed', f.failed, b.failed
    UNION ALL
    SELECT 'waiting', f.waiting, b.waiting
    UNION ALL
    SELECT 'running retries', y.items, c.retrying
    UNION ALL
    SELECT 'cancelled', f.cancelled + CASE WHEN b.state = 'cancelled' THEN b.total - c.covered ELSE 0 END, b.cancelled
    UNION ALL
    SELECT 'claimed', b.claimed_to, c.covered
    WHERE b.state <> 'cancelled'
    UNION ALL
    SELECT 'claimed twice', 0, c.overlap
    UNION ALL
    SELECT 'done', c.done_to, c.done
    UNION ALL
    SELECT 'negative counters', 0,
        (b.succeeded < 0)::int + (b.ignored < 0)::int + (b.failed < 0)::int + (b.cancelled < 0)::int
        + (b.waiting < 0)::int + (b.running < 0)::int + (b.pending < 0)::int
    UNION ALL
    SELECT 'live items', 0, b.waiting + b.running + b.pending
    WHERE b.state = 'finished' OR b.finished_at IS NOT NULL
    UNION ALL
    SELECT 'locks', f.keyed + y.keyed + (
            SELECT count(*)
            FROM (
                SELECT b.claimed_to + 1 AS from_no, b.total AS to_no
                UNION ALL
                SELECT lower(r), upper(r) - 1
                FROM redrive.chunks AS h
                CROSS JOIN LATERAL unnest(int8multirange(int8range(h.done_to, h.to_no, '(]')) - coalesce(h.settled, '{}')) AS r
                WHERE h.batch_id = b.batch_id AND NOT h.folded AND h.kind = 'first' AND h.state <> 'done'
            ) AS g
            JOIN redrive.item_blocks AS x
                ON x.part = b.part AND x.batch_id = b.batch_id AND x.first_no <= g.to_no AND x.first_no + x.items > g.from_no
            CROSS JOIN LATERAL unnest(x.keys) WITH ORDINALITY AS u (key, place)
            WHERE b.keyed AND u.key IS NOT NULL AND x.first_no + u.place - 1 BETWEEN g.from_no AND g.to_no),
        coalesce(k.locks, 0)
) AS r;

CREATE FUNCTION redrive.verify(batch_id bigint DEFAULT NULL)
RETURNS SETOF redrive.check_result
LANGUAGE sql STABLE AS $$
    SELECT r.batch_id, r.check_name, r.expected, r.actual, r.expected = r.actual
    FROM redrive._verify AS r
    WHERE r.batch_id = $1
    UNION ALL
    SELECT r.batch_id, r.check_name, r.expected, r.actual, r.expected = r.actual
    FROM redrive._verify AS r
    WHERE $1 IS NULL
$$;
COMMENT ON FUNCTION redrive.verify IS
'Prove the counters of a batch, or of all you may see, from the rows they count: one row per check, ok tells. It holds at every commit, while workers run too; a row that is not ok is a bug worth reporting. Reads every failure and chunk of the batch.';
