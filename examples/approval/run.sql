-- A batch of approvals from the tick in the to-do list to the last message.
--
--     psql -f examples/approval/run.sql
--
-- as a superuser, in a scratch database of a server that has pg_redrive preloaded.
\set ON_ERROR_STOP on
\set QUIET on
\pset footer off
\pset null '-'
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS pg_redrive;
CREATE SCHEMA approval;
SET search_path = approval, public;
\ir application.sql
\o /dev/null
\ir handlers.sql
\o

-- Wait for something, as a web page with a progress bar would: it looks at the
-- views again and again.
CREATE PROCEDURE wait_until(p_condition text)
LANGUAGE plpgsql AS $$
DECLARE
    v_met boolean;
BEGIN
    LOOP
        EXECUTE p_condition INTO v_met;
        EXIT WHEN v_met;
        COMMIT;
        PERFORM pg_sleep(0.05);
    END LOOP;
END
$$;
-- A batch of which each item was attempted is retrying or finished.
CREATE PROCEDURE wait_until_attempted(p_batch bigint)
LANGUAGE plpgsql AS $$
BEGIN
    CALL wait_until(format('SELECT state IN (''retrying'', ''finished'') FROM redrive.batch_progress WHERE batch_id = %s', p_batch));
END
$$;

INSERT INTO cost_centers (code, budget) VALUES ('travel', 1000), ('books', 100);
INSERT INTO forms (form_id, applicant, state, fields) VALUES
    (1, 'anna', 'submitted', '{"cost_center": "travel", "amount": 120}'),
    (2, 'ben', 'submitted', '{"cost_center": "travel", "amount": "80.50"}'),
    (3, 'clara', 'submitted', '{"cost_center": "books", "amount": 30}'),
    (4, 'dora', 'withdrawn', '{"cost_center": "books", "amount": 15}'),
    (5, 'emil', 'submitted', '{"cost_center": "books"}'),
    (6, 'fritz', 'submitted', '{"cost_center": "books", "amount": "forty"}'),
    (7, 'gina', 'submitted', '{"cost_center": "books", "amount": 200}'),
    (8, 'hugo', 'submitted', '{"cost_center": "travel", "amount": 5000}'),
    (9, 'ida', 'submitted', '{"cost_center": "software", "amount": 49}');
INSERT INTO tasks (task_id, form_id, assignee) SELECT 100 + form_id, form_id, 'zoe' FROM forms;

\echo '== Zoe ticks all of her nine tasks'
SELECT approve_tasks(array_agg(task_id ORDER BY task_id), 'zoe') AS batch FROM tasks \gset
CALL wait_until_attempted(:batch);
SELECT state, total, succeeded, ignored, failed, waiting FROM redrive.batch_progress WHERE batch_id = :batch;
SELECT item_no, key AS task, state, error_class, message, detail FROM redrive.failed_items WHERE batch_id = :batch ORDER BY item_no;

\echo '== Those that wait are still locked: nobody can tick them a second time'
SELECT task_id, done, locked FROM tasks ORDER BY task_id;
DO $$
BEGIN
    PERFORM approval.approve_tasks(ARRAY[107], 'yuri');
    RAISE EXCEPTION 'this should have been refused';
EXCEPTION WHEN lock_not_available THEN
    NULL;
END
$$;

\echo '== The money for books is found, and the cost centre for software is there'
UPDATE cost_centers SET budget = 500 WHERE code = 'books';
INSERT INTO cost_centers (code, budget) VALUES ('software', 1000);

\echo '== The pass retry_failed, three times, as pg_cron calls it each minute'
SELECT pass, outcome, acted FROM redrive.retry_failed();
CALL wait_until_attempted(:batch);
SELECT pass, outcome, acted FROM redrive.retry_failed();
CALL wait_until_attempted(:batch);
SELECT pass, outcome, acted FROM redrive.retry_failed();
CALL redrive.wait(:batch, timeout => '1 min');
CALL wait_until('SELECT count(*) = 1 FROM approval.reports');

\echo '== Hugo has used up his retries: his task has failed, and is unlocked like all others'
SELECT state, run_no, total, succeeded, ignored, failed, waiting FROM redrive.batch_progress WHERE batch_id = :batch;
SELECT item_no, key AS task, state, reason, message, retry_count FROM redrive.failed_items WHERE batch_id = :batch ORDER BY item_no;
SELECT count(*) FILTER (WHERE done) AS done, count(*) FILTER (WHERE locked) AS locked FROM tasks;

\echo '== Somebody pays for Hugo after all: what failed by a user error is run again'
UPDATE cost_centers SET budget = 10000 WHERE code = 'travel';
UPDATE tasks SET locked = true WHERE task_id = 108;
SELECT redrive.redrive(:batch, error_class => 'user_error') AS run_no;
CALL redrive.wait(:batch, timeout => '1 min');
SELECT state, run_no, succeeded, ignored, failed FROM redrive.batch_progress WHERE batch_id = :batch;

\echo '== Twenty thousand small forms, as sets; 21000 is withdrawn, and 22000 has a cost centre that nobody knows'
INSERT INTO forms (form_id, applicant, state, fields)
SELECT n, 'applicant ' || n, CASE n WHEN 21000 THEN 'withdrawn' ELSE 'submitted' END,
    jsonb_build_object('amount', 1, 'cost_center', CASE n WHEN 22000 THEN 'nowhere' ELSE 'travel' END)
FROM generate_series(10001, 30000) AS n;
INSERT INTO tasks (task_id, form_id, assignee, locked) SELECT form_id, form_id, 'zoe', true FROM forms WHERE form_id > 10000;
\o /dev/null
\ir set_handler.sql
\o
SELECT redrive.submit_query('approval: many', $$SELECT task_id::text, '{"approver": "zoe"}'::jsonb FROM approval.tasks WHERE task_id > 10000 ORDER BY 1$$) AS many \gset
CALL wait_until_attempted(:many);
SELECT state, total, succeeded, ignored, failed, waiting FROM redrive.batch_progress WHERE batch_id = :many;
SELECT key AS task, state, error_class, sqlstate, message FROM redrive.failed_items WHERE batch_id = :many ORDER BY item_no;
-- nobody waits for it to arrive
SELECT redrive.cancel_batch(:many);

\echo '== What was told to whom, after each commit'
CALL wait_until('SELECT count(*) = 2 FROM approval.reports');
CALL wait_until($$SELECT bool_and(state = 'finished') FROM redrive.batch_progress WHERE handler = 'approval: message'$$);
SELECT recipient, message FROM sent_messages ORDER BY recipient, sent_at;

\echo '== All adds up'
SELECT count(*) AS checks, count(*) FILTER (WHERE NOT ok) AS broken FROM redrive.verify();
SELECT code, spent, (SELECT sum(b.amount) FROM bookings AS b WHERE b.cost_center = c.code) AS booked FROM cost_centers AS c ORDER BY code;
