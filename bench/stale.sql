-- Fill the tables directly: :finished batches with their chunks, :live ones of which nothing is stale, :items items, :failures items that
-- failed for good in 60 groups, and as many pushes to three platforms with an attempt each.
INSERT INTO redrive.batches (handler_id, part, state, priority, total, claimed_to, succeeded, submitted_by, run_at, serve_after,
    created_at, sealed_at, started_at, last_progress_at, attempted_at, finished_at)
SELECT 1, 0, 'finished', 0, 100, 100, 100, current_user::regrole, t, t, t, t, t, t, t, t
FROM (SELECT now() - g * interval '1 min' AS t FROM generate_series(1, :finished) AS g) AS x;

INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, done, succeeded, folded,
    claimed_at, progress_at, finished_at)
SELECT batch_id, handler_id, part, 1, 'first', 'done', 1, 100, 100, 100, 100, 100, true, run_at, run_at, run_at
FROM redrive.batches AS b
WHERE state = 'finished' AND NOT EXISTS (SELECT FROM redrive.chunks AS c WHERE c.batch_id = b.batch_id);

-- half of the live ones wait for their turn, a quarter is running, a quarter waits for a retry
INSERT INTO redrive.batches (handler_id, part, state, priority, total, claimed_to, succeeded, waiting, submitted_by, run_at, serve_after,
    next_retry_at, oldest_failure_at, created_at, sealed_at, started_at, last_progress_at, attempted_at)
SELECT 1, 0, CASE WHEN g % 4 < 2 THEN 'ready' WHEN g % 4 = 2 THEN 'running' ELSE 'retrying' END::redrive.batch_state, 0, 100,
    CASE g % 4 WHEN 3 THEN 100 WHEN 2 THEN 50 ELSE 0 END, CASE g % 4 WHEN 3 THEN 99 WHEN 2 THEN 50 ELSE 0 END,
    CASE g % 4 WHEN 3 THEN 1 ELSE 0 END, current_user::regrole, now(), now(),
    CASE WHEN g % 4 = 3 THEN now() + interval '30 min' END, CASE WHEN g % 4 = 3 THEN now() END,
    now(), now(), CASE WHEN g % 4 >= 2 THEN now() END, now(), CASE WHEN g % 4 = 3 THEN now() END
FROM generate_series(1, :live) AS g;

INSERT INTO redrive.failures (part, batch_id, item_no, handler_id, run_no, state, error_class, sqlstate, fingerprint, retry_count,
    free_count, attempts, first_failed_at, last_failed_at, next_attempt_at, message)
SELECT part, batch_id, 100, handler_id, 1, 'waiting', 'other', 'P0001', 'x', 0, 0, 1, now(), now(), next_retry_at, 'no'
FROM redrive.batches
WHERE state = 'retrying' AND next_retry_at IS NOT NULL
ON CONFLICT DO NOTHING;

-- the items, 50 to a block
INSERT INTO redrive.item_blocks (part, batch_id, first_no, items, bytes, payloads)
SELECT 0, 1000000000 + :finished, 50 * g + 1, 50, 3000, array_fill('{"id": 1, "note": "forty characters of a usual payload"}'::jsonb, ARRAY[50])
FROM generate_series(0, :items / 50 - 1) AS g;

-- of the batches that ended
INSERT INTO redrive.failures (part, batch_id, item_no, handler_id, run_no, state, reason, error_class, sqlstate, fingerprint, retry_count,
    free_count, attempts, first_failed_at, last_failed_at, message)
SELECT 0, b.batch_ids[1 + g % cardinality(b.batch_ids)], 1 + g / cardinality(b.batch_ids), 1, 1, 'failed', 'exhausted', 'class ' || g % 3, '2200' || g % 10, md5((g % 60)::text), 3,
    0, 4, now() - g * interval '0.1 s', now() - g * interval '0.1 s', 'item ' || g || ' is not as it should be'
FROM (SELECT array_agg(batch_id) AS batch_ids FROM redrive.batches WHERE state = 'finished') AS b
CROSS JOIN generate_series(0, :failures - 1) AS g;

BEGIN;
SELECT redrive.create_platform(name, 'https://' || name || '.example/'), redrive.pause_platform(name)
FROM (SELECT 'p' || n AS name FROM generate_series(1, 3) AS n WHERE :failures > 0) AS x;
COMMIT;
INSERT INTO redrive.tasks (owner, task_key, status, payload, is_test)
SELECT current_user::regrole, 'task ' || g, 'done', '{}', false
FROM generate_series(1, :failures / 3) AS g;
INSERT INTO redrive.pushes (task_id, platform_id, state, wanted_version, wanted_status, awaits_build, attempt_no, next_attempt_at)
SELECT t.task_id, p.platform_id, coalesce((ARRAY['dead', 'waiting', 'pending'])[1 + t.task_id % 100], 'delivered')::redrive.push_state,
    1, 'done', false, 1, now() + interval '1 h'
FROM redrive.tasks AS t
CROSS JOIN redrive.platforms AS p;
INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe)
SELECT 0, u.push_id, 1, u.platform_id, 1, t.at - interval '30 ms', t.at, u.push_id % 10 > 1, true, false
FROM redrive.pushes AS u
CROSS JOIN LATERAL (SELECT now() - u.push_id * interval '0.1 s' AS at) AS t;
VACUUM (ANALYZE) redrive.batches, redrive.chunks, redrive.failures, redrive.item_blocks, redrive.tasks, redrive.pushes, redrive.push_log;
CHECKPOINT;
