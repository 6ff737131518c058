-- Views.  They are what people look at in psql, and the only way to the tables:
-- nobody has rights on those.  Each filters rows through redrive._visible, and
-- shows payloads, keys and messages only to roles with the rights of the
-- handler's owner.

-- Items p_from to p_to of a batch, reading only the blocks they are in.
CREATE FUNCTION redrive._items(p_part smallint, p_batch_id bigint, p_from bigint, p_to bigint)
RETURNS TABLE (item_no bigint, key text, payload jsonb)
LANGUAGE sql STABLE AS $$
    SELECT k.first_no + u.place - 1, u.key, u.payload
    FROM redrive.item_blocks AS k
    CROSS JOIN LATERAL unnest(k.keys, k.payloads) WITH ORDINALITY AS u (key, payload, place)
    WHERE k.part = $1 AND k.batch_id = $2 AND k.first_no <= $4
      AND k.first_no >= coalesce((
            SELECT o.first_no
            FROM redrive.item_blocks AS o
            WHERE o.part = $1 AND o.batch_id = $2 AND o.first_no <= $3
            ORDER BY o.first_no DESC
            LIMIT 1), 0)
      AND k.first_no + u.place - 1 BETWEEN $3 AND $4
$$;

CREATE VIEW redrive.items WITH (security_barrier) AS
SELECT k.part, k.batch_id, k.first_no + u.place - 1 AS item_no, u.key, u.payload
FROM redrive.item_blocks AS k
JOIN redrive.batches AS b ON b.batch_id = k.batch_id AND b.part = k.part
JOIN redrive._visible AS v ON v.handler_id = b.handler_id AND v.mine
CROSS JOIN LATERAL unnest(k.keys, k.payloads) WITH ORDINALITY AS u (key, payload, place);

-- Batches with their counters as they were committed.
CREATE VIEW redrive._batches AS
SELECT b.batch_id, b.handler_id, b.part, b.state, b.label, b.priority, b.run_no, b.total, b.claimed_to, b.keyed,
    b.succeeded + coalesce(u.succeeded, 0) AS succeeded,
    b.ignored + coalesce(u.ignored, 0) AS ignored,
    b.failed + coalesce(u.failed, 0) AS failed,
    b.cancelled + coalesce(u.cancelled, 0) AS cancelled,
    b.waiting + coalesce(u.waiting, 0) AS waiting,
    coalesce(u.running, 0) AS running,
    b.total - b.claimed_to + coalesce(u.pending, 0) AS pending,
    coalesce(u.running_chunks, 0) AS running_chunks,
    b.items_per_second, b.run_at, b.next_retry_at, b.created_at, b.sealed_at, b.started_at,
    greatest(b.last_progress_at, u.progress_at) AS last_progress_at,
    b.attempted_at, b.finished_at, b.pause_reason
FROM redrive.batches AS b
LEFT JOIN redrive._unfolded AS u ON u.batch_id = b.batch_id;

-- Items that a worker has done in the interval it has not committed yet are
-- counted as succeeded; those that failed in it are not classified for good
-- and still count as running.
CREATE VIEW redrive.batch_progress WITH (security_barrier) AS
SELECT p.batch_id, p.handler, p.label, p.state, p.run_no, p.total,
    p.succeeded, p.ignored, p.failed, p.cancelled, p.waiting, p.running, p.pending,
    CASE WHEN p.total > 0 THEN (p.final * 1000 / p.total)::numeric(5) * 0.1
         WHEN p.state = 'finished' THEN 100.0 END AS percent_done,
    round(nullif(p.rate, 0)::numeric, CASE WHEN p.rate < 1 THEN 3 WHEN p.rate < 10 THEN 1 ELSE 0 END) AS items_per_second,
    CASE WHEN p.state NOT IN ('running', 'retrying') THEN NULL
         WHEN p.running + p.pending = 0 THEN date_trunc('second', greatest(p.next_retry_at - now(), interval '0'))
         WHEN coalesce(p.pace, p.rate) > 0 THEN make_interval(secs => ceil(least((p.running + p.pending) / coalesce(p.pace, p.rate), 1e9))) END AS time_left,
    p.created_at, p.started_at, p.last_progress_at, p.finished_at,
    p.priority, p.run_at, p.next_retry_at, p.pause_reason
FROM (
    SELECT b.batch_id, v.name AS handler, b.label, b.state, b.run_no, b.total,
        b.succeeded + o.open AS succeeded, b.ignored, b.failed, b.cancelled, b.waiting, b.running - o.open AS running, b.pending,
        b.succeeded + o.open + b.ignored + b.failed + b.cancelled AS final,
        CASE
            WHEN s.rate > 0 THEN s.rate
            WHEN b.run_no > 1 THEN b.items_per_second
            ELSE (b.succeeded + b.ignored + b.failed + b.waiting)
                 / nullif(date_part('epoch', coalesce(b.attempted_at, b.finished_at, now()) - b.started_at), 0)
        END AS rate,
        -- the mean of the last chunks: a worker between two claims has no rate of its own
        nullif(b.items_per_second, 0) * greatest(b.running_chunks, 1) AS pace,
        b.created_at, b.started_at, b.last_progress_at, b.finished_at,
        b.priority, b.run_at, b.next_retry_at, CASE WHEN v.mine THEN b.pause_reason END AS pause_reason
    FROM redrive._batches AS b
    JOIN redrive._visible AS v ON v.handler_id = b.handler_id
    LEFT JOIN (
        SELECT x.batch_id, sum(x.open_succeeded)::bigint AS open, sum(x.items_per_second) AS rate
        FROM redrive._slots() AS x
        WHERE x.chunk_id IS NOT NULL
        GROUP BY x.batch_id
    ) AS s ON s.batch_id = b.batch_id
    CROSS JOIN LATERAL (SELECT least(coalesce(s.open, 0), b.running) AS open) AS o
) AS p;

CREATE VIEW redrive.stale_batches WITH (security_barrier) AS
SELECT s.batch_id, s.handler, s.reason, s.since, s.action
FROM redrive.stale_batches_at(now()) AS s;

CREATE VIEW redrive.failed_items WITH (security_barrier) AS
SELECT f.batch_id, f.item_no,
    CASE WHEN v.mine THEN f.key END AS key,
    f.state, f.reason, f.error_class, f.sqlstate,
    CASE WHEN v.mine THEN f.message END AS message,
    CASE WHEN v.mine THEN f.detail END AS detail,
    CASE WHEN v.mine THEN f.hint END AS hint,
    CASE WHEN v.mine THEN f.context END AS context,
    f.constraint_name, f.fingerprint, f.retry_count, f.first_failed_at, f.last_failed_at, f.next_attempt_at,
    v.name AS handler, f.attempts, f.run_no
FROM redrive.failures AS f
JOIN redrive.batches AS b ON b.batch_id = f.batch_id AND b.part = f.part
JOIN redrive._visible AS v ON v.handler_id = b.handler_id;

-- For the report: a condition on the state of failed_items, outside, would look at all of them.
CREATE VIEW redrive._waiting WITH (security_barrier) AS
SELECT v.name AS handler, f.next_attempt_at
FROM redrive.failures AS f
JOIN redrive._visible AS v ON v.handler_id = f.handler_id
WHERE f.state = 'waiting';

CREATE VIEW redrive.crashed_items WITH (security_barrier) AS
SELECT x.batch_id, x.item_no, v.name AS handler, x.crash_count, x.first_crashed_at, x.last_crashed_at
FROM redrive.crashes AS x
JOIN redrive.batches AS b ON b.batch_id = x.batch_id
JOIN redrive._visible AS v ON v.handler_id = b.handler_id
WHERE x.crash_count > 0;

CREATE VIEW redrive.failure_attempts WITH (security_barrier) AS
SELECT a.batch_id, a.item_no, a.attempt, a.run_no, a.failed_at, a.error_class, a.sqlstate,
    CASE WHEN v.mine THEN a.message END AS message,
    CASE WHEN v.mine THEN a.detail END AS detail,
    CASE WHEN v.mine THEN a.hint END AS hint,
    CASE WHEN v.mine THEN a.context END AS context,
    a.constraint_name, a.fingerprint
FROM (
    SELECT l.part, l.batch_id, l.item_no, l.attempt, l.run_no, l.failed_at, l.error_class, l.sqlstate,
        l.message, l.detail, l.hint, l.context, l.constraint_name, l.fingerprint
    FROM redrive.failure_log AS l
    UNION ALL
    SELECT f.part, f.batch_id, f.item_no, f.attempts, f.run_no, f.last_failed_at, f.error_class, f.sqlstate,
        f.message, f.detail, f.hint, f.context, f.constraint_name, f.fingerprint
    FROM redrive.failures AS f
) AS a
JOIN redrive.batches AS b ON b.batch_id = a.batch_id AND b.part = a.part
JOIN redrive._visible AS v ON v.handler_id = b.handler_id;

-- Any message will do as the sample; to compare bytes takes less time than the rules of a language.
CREATE VIEW redrive.failure_groups WITH (security_barrier) AS
SELECT v.name AS handler, g.fingerprint, g.error_class, g.sqlstate,
    CASE WHEN v.mine THEN g.sample_message END AS sample_message,
    g.items, g.waiting, g.failed, g.first_seen, g.last_seen
FROM (
    SELECT f.handler_id, f.fingerprint, f.error_class, f.sqlstate,
        min(f.message COLLATE "C") COLLATE "default" AS sample_message,
        count(*) AS items,
        count(*) FILTER (WHERE f.state = 'waiting') AS waiting,
        count(*) FILTER (WHERE f.state = 'failed') AS failed,
        min(f.first_failed_at) AS first_seen,
        max(f.last_failed_at) AS last_seen
    FROM redrive.failures AS f
    JOIN redrive.batches AS b ON b.batch_id = f.batch_id
    GROUP BY f.handler_id, f.fingerprint, f.error_class, f.sqlstate
) AS g
JOIN redrive._visible AS v ON v.handler_id = g.handler_id;

-- Items that failed before and are run again by a chunk that is not done.
CREATE VIEW redrive._retrying AS
SELECT c.part, c.batch_id, c.chunk_id, u.item_no
FROM redrive.chunks AS c
JOIN redrive.retry_lists AS l ON l.chunk_id = c.chunk_id
CROSS JOIN LATERAL unnest(l.item_nos) AS u (item_no)
WHERE NOT c.folded AND c.kind = 'retry' AND c.state <> 'done' AND u.item_no > c.done_to AND (c.settled @> u.item_no) IS NOT TRUE;

CREATE VIEW redrive.item_status WITH (security_barrier) AS
SELECT b.batch_id, i.item_no,
    CASE WHEN v.mine THEN i.key END AS key,
    CASE
        WHEN f.state IS NOT NULL THEN f.state::text
        WHEN r.item_no IS NOT NULL THEN 'running'
        WHEN i.item_no > b.claimed_to THEN 'pending'
        WHEN c.state = 'running' THEN 'running'
        WHEN c.state = 'orphaned' THEN 'pending'
        WHEN b.state = 'cancelled' AND NOT EXISTS (
            SELECT FROM redrive.chunks AS d
            WHERE d.batch_id = b.batch_id AND d.kind = 'first' AND (i.item_no BETWEEN d.from_no AND d.done_to OR d.settled @> i.item_no)) THEN 'cancelled'
        ELSE 'succeeded'
    END AS state
FROM redrive.batches AS b
JOIN redrive._visible AS v ON v.handler_id = b.handler_id
JOIN (
    SELECT k.part, k.batch_id, k.first_no + u.place - 1 AS item_no, u.key
    FROM redrive.item_blocks AS k
    CROSS JOIN LATERAL ROWS FROM (unnest(k.keys), generate_series(1, k.items)) AS u (key, place)
) AS i ON i.part = b.part AND i.batch_id = b.batch_id
LEFT JOIN redrive.failures AS f ON f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = i.item_no
LEFT JOIN redrive._retrying AS r ON r.batch_id = b.batch_id AND r.item_no = i.item_no
LEFT JOIN redrive.chunks AS c
    ON c.batch_id = b.batch_id AND NOT c.folded AND c.state <> 'done' AND c.kind = 'first' AND i.item_no BETWEEN c.done_to + 1 AND c.to_no
    AND (c.settled @> i.item_no) IS NOT TRUE;

CREATE VIEW redrive.queue_stats WITH (security_barrier) AS
SELECT v.name AS handler,
    coalesce(q.workers, 0)::bigint AS workers,
    coalesce(q.ready, 0)::bigint AS ready,
    coalesce(q.delayed, 0)::bigint AS delayed,
    coalesce(q.in_flight, 0)::bigint AS in_flight,
    coalesce(q.waiting_retry, 0)::bigint AS waiting_retry,
    date_trunc('second', now() - q.ready_since) AS oldest_ready_age,
    v.max_workers, v.paused
FROM redrive._visible AS v
LEFT JOIN (
    SELECT b.handler_id,
        sum(b.running_chunks) AS workers,
        sum(b.pending) FILTER (WHERE r.ready) AS ready,
        sum(b.pending) FILTER (WHERE NOT r.ready) AS delayed,
        sum(b.running) AS in_flight,
        sum(b.waiting) AS waiting_retry,
        min(greatest(b.run_at, b.sealed_at)) FILTER (WHERE r.ready AND b.pending > 0) AS ready_since
    FROM redrive._batches AS b
    CROSS JOIN LATERAL (SELECT b.state IN ('ready', 'running', 'retrying') AND b.run_at <= now() AS ready) AS r
    WHERE b.state NOT IN ('finished', 'cancelled')
    GROUP BY b.handler_id
) AS q ON q.handler_id = v.handler_id;

-- The slots that a role may see are those that _slots() returns to it.
-- A server that did not preload the library has no slots: its foreground
-- workers are known by their chunks, as external ones always are.
CREATE VIEW redrive.workers WITH (security_barrier) AS
SELECT s.pid, s.kind, v.name AS handler, s.batch_id, s.chunk_id, s.state, s.item_no,
    s.item_started_at, s.open_succeeded, s.open_failed,
    round(s.items_per_second::numeric, CASE WHEN s.items_per_second < 1 THEN 3 WHEN s.items_per_second < 10 THEN 1 ELSE 0 END) AS items_per_second,
    s.claimed_at, pg_get_userbyid(s.owner) AS role, s.started_at, NULL::text AS worker, NULL::timestamptz AS lease_until
FROM redrive._slots() AS s
LEFT JOIN redrive._visible AS v ON v.handler_id = s.handler_id
UNION ALL
SELECT c.worker_pid, 'foreground', v.name, c.batch_id, c.chunk_id, 'running', NULL,
    NULL, NULL, NULL,
    NULL,
    c.claimed_at, pg_get_userbyid(v.owner), c.worker_started_at, NULL, NULL
FROM redrive.chunks AS c
JOIN redrive._visible AS v ON v.handler_id = c.handler_id
WHERE c.state = 'running' AND c.worker_pid IS NOT NULL AND NOT (SELECT redrive._preloaded())
UNION ALL
SELECT NULL, 'external', v.name, c.batch_id, c.chunk_id, 'running', NULL,
    NULL, NULL, NULL,
    NULL,
    c.claimed_at, pg_get_userbyid(v.owner), NULL, CASE WHEN v.mine THEN c.worker END, c.lease_until
FROM redrive.chunks AS c
JOIN redrive._visible AS v ON v.handler_id = c.handler_id
WHERE c.state = 'running' AND c.lease_until IS NOT NULL;

-- Everybody may know that the passes run; what they did counts batches of all.
CREATE VIEW redrive.pass_history WITH (security_barrier) AS
SELECT l.pass, l.as_of, l.started_at, l.finished_at,
    CASE WHEN m.monitor THEN l.acted END AS acted,
    CASE WHEN m.monitor THEN l.more END AS more,
    CASE WHEN m.monitor THEN l.detail END AS detail
FROM redrive.pass_log AS l
CROSS JOIN (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT') AS monitor) AS m;

-- Chunks that have ended, for sums over time.
CREATE VIEW redrive._ended WITH (security_barrier) AS
SELECT c.finished_at, v.name AS handler, c.done, c.succeeded, c.ignored, c.failed
FROM redrive.chunks AS c
JOIN redrive._visible AS v ON v.handler_id = c.handler_id
WHERE c.state = 'done';

CREATE VIEW redrive.throughput WITH (security_barrier) AS
SELECT t.minute, t.handler, t.items, t.succeeded, t.ignored, t.failed, t.to_retry,
    round(t.items / 60.0, CASE WHEN t.items < 600 THEN 1 ELSE 0 END) AS items_per_second
FROM (
    SELECT date_trunc('minute', e.finished_at) AS minute, e.handler,
        sum(e.done)::bigint AS items,
        sum(e.succeeded)::bigint AS succeeded,
        sum(e.ignored)::bigint AS ignored,
        sum(e.failed)::bigint AS failed,
        sum(e.done - e.succeeded - e.ignored - e.failed)::bigint AS to_retry
    FROM redrive._ended AS e
    WHERE e.finished_at > date_trunc('minute', now()) - interval '6 hours'
    GROUP BY 1, 2
) AS t;
