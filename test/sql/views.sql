-- Views: their columns, what they show in each state, and to whom.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

-- Columns in the order of the contract; more may follow.
\pset format unaligned
SELECT c.relname AS view, string_agg(a.attname, ', ' ORDER BY a.attnum) AS columns
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind = 'v' AND c.relname NOT LIKE '\_%' GROUP BY c.relname ORDER BY c.relname;
\pset format aligned

CREATE TABLE looked (what text, state text, live bigint);
CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    CASE item.payload ->> 0
        WHEN 'fail' THEN RAISE EXCEPTION 'secret of item %', item.item_no USING ERRCODE = '22000', DETAIL = 'secret detail', HINT = 'secret hint', CONSTRAINT = 'a_constraint';
        WHEN 'ignore' THEN PERFORM redrive.raise_validation('secret not valid', 'secret detail');
        WHEN 'wait' THEN RAISE EXCEPTION 'secret of item % in "%"', item.item_no, item.key;
        WHEN 'once' THEN
            IF item.attempt = 1 THEN
                RAISE EXCEPTION 'secret once';
            END IF;
        WHEN 'pause' THEN PERFORM redrive.pause_batch(item.batch_id);
        WHEN 'defect' THEN RAISE EXCEPTION 'secret defect' USING ERRCODE = '42P01';
        WHEN 'look' THEN
            INSERT INTO scratch.looked
            SELECT format('worker, item %s, %s', w.item_no, w.kind), w.state, w.open_succeeded FROM redrive.workers AS w WHERE w.pid = pg_backend_pid()
            UNION ALL
            SELECT format('batch, running %s', p.running), p.state::text, p.succeeded FROM redrive.batch_progress AS p WHERE p.batch_id = item.batch_id
            UNION ALL
            SELECT format('item %s', s.item_no), s.state, NULL FROM redrive.item_status AS s WHERE s.batch_id = item.batch_id AND s.item_no = item.item_no
            UNION ALL
            SELECT format('queue, in flight %s', q.in_flight), NULL, q.workers FROM redrive.queue_stats AS q WHERE q.handler = 'looks';
        ELSE NULL;
    END CASE;
END
$$;

-- Empty.
SELECT count(*) FROM redrive.batch_progress;
SELECT count(*) FROM redrive.queue_stats;
SELECT count(*) FROM redrive.workers;

CREATE ROLE regress_views_a LOGIN;
CREATE ROLE regress_views_b LOGIN;
CREATE ROLE regress_views_member LOGIN IN ROLE regress_views_a;
CREATE ROLE regress_views_monitor LOGIN;
SELECT redrive.grant_user('regress_views_a');
SELECT redrive.grant_user('regress_views_b');
SELECT redrive.grant_user('regress_views_member');
SELECT redrive.grant_monitor('regress_views_monitor');
GRANT SELECT, INSERT ON looked TO regress_views_a;

SET SESSION AUTHORIZATION regress_views_a;
SELECT redrive.create_handler('h', 'take', retry_delay => '1 h', isolation => 'item');
SELECT redrive.create_handler('looks', 'take');
SELECT redrive.submit('h', ARRAY['["good"]', '["fail"]', '["ignore"]', '["wait"]', '["once"]', '["fail"]']::jsonb[], ARRAY['secret 1', 'secret 2', 'secret 3', 'secret 4', 'secret 5', NULL], label => 'outcomes') > 0 AS made;
SELECT redrive.submit('h', ARRAY['["good"]', '["pause"]', '["good"]', '["good"]']::jsonb[], label => 'paused') > 0 AS made;
SELECT redrive.submit('h', ARRAY['["defect"]', '["good"]']::jsonb[], label => 'defect') > 0 AS made;
SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], label => 'delayed', run_at => '2040-01-01', priority => 5) > 0 AS made;
SELECT redrive.submit('looks', ARRAY['["good"]', '["good"]', '["look"]', '["good"]']::jsonb[], label => 'looked at') > 0 AS made;
SELECT redrive.open_batch('h', label => 'open') > 0 AS made;
SELECT redrive.add_items(batch('open'), ARRAY['1']::jsonb[]);
CALL redrive.work();
CALL make_due();
CALL redrive.work();
SELECT redrive.submit('h', ARRAY['1', '2', '3']::jsonb[], label => 'ready') > 0 AS made;
SELECT redrive.submit('h', ARRAY['1']::jsonb[], label => 'cancelled') > 0 AS made;
SELECT redrive.cancel_batch(batch('cancelled'));

-- batch_progress.
SELECT label, handler, state, run_no, total, succeeded, ignored, failed, cancelled, waiting, running, pending, percent_done FROM redrive.batch_progress ORDER BY batch_id;
SELECT label, items_per_second > 0 AS rate, time_left IS NOT NULL AS time_left, created_at IS NOT NULL AS created, started_at IS NOT NULL AS started, last_progress_at IS NOT NULL AS progress, finished_at IS NOT NULL AS finished,
    priority, run_at = '2040-01-01' AS run_at, next_retry_at IS NOT NULL AS next_retry, pause_reason FROM redrive.batch_progress ORDER BY batch_id;
-- item_status: each state.
SELECT p.label, s.item_no, s.key, s.state FROM redrive.item_status AS s JOIN redrive.batch_progress AS p USING (batch_id) ORDER BY s.batch_id, s.item_no;
-- A worker, its batch and its item while it runs: live, not only what is committed.
SELECT * FROM looked ORDER BY what;
-- failed_items, failure_attempts, failure_groups.
SELECT p.label, f.item_no, f.key, f.state, f.reason, f.error_class, f.sqlstate, f.message, f.detail, f.hint, f.constraint_name, f.retry_count, f.next_attempt_at IS NOT NULL AS next, f.handler, f.attempts, f.run_no
FROM redrive.failed_items AS f JOIN redrive.batch_progress AS p USING (batch_id) ORDER BY f.batch_id, f.item_no;
SELECT count(*) AS items, count(context) AS contexts, count(DISTINCT fingerprint) AS fingerprints, bool_and(length(fingerprint) = 16) AS hex, bool_and(first_failed_at <= last_failed_at) AS in_order FROM redrive.failed_items;
SELECT item_no, attempt, run_no, error_class, sqlstate, message, detail, hint, constraint_name FROM redrive.failure_attempts ORDER BY batch_id, item_no, attempt;
SELECT handler, error_class, sqlstate, sample_message, items, waiting, failed, first_seen <= last_seen AS in_order FROM redrive.failure_groups ORDER BY sqlstate;
-- items, queue_stats, throughput.
SELECT p.label, i.item_no, i.key, i.payload FROM redrive.items AS i JOIN redrive.batch_progress AS p USING (batch_id) ORDER BY i.batch_id, i.item_no;
SELECT handler, workers, ready, delayed, in_flight, waiting_retry, oldest_ready_age IS NOT NULL AS age, max_workers, paused FROM redrive.queue_stats ORDER BY handler;
SELECT handler, sum(items) AS items, sum(succeeded) AS succeeded, sum(ignored) AS ignored, sum(failed) AS failed, sum(to_retry) AS to_retry FROM redrive.throughput GROUP BY handler ORDER BY handler;
SELECT count(*) AS stale FROM redrive.stale_batches;
SELECT batch_id = batch('ready') AS ready, handler, reason FROM redrive.stale_batches_at(now() + interval '2 h') WHERE reason = 'never_started';
RESET SESSION AUTHORIZATION;
SELECT outcome FROM redrive.rescue_stale();
SELECT outcome FROM redrive.purge();

-- A count of all that a role sees, with the secrets it sees.
CREATE FUNCTION seen() RETURNS TABLE (view text, total bigint, secrets bigint) LANGUAGE plpgsql AS $$
BEGIN
    FOR view IN SELECT v FROM unnest(ARRAY['batch_progress', 'failed_items', 'failure_attempts', 'failure_groups', 'item_status', 'items', 'pass_history', 'queue_stats', 'stale_batches', 'throughput', 'workers']) AS v LOOP
        -- a minute may end in between
        EXECUTE format('SELECT %s, count(*) FILTER (WHERE to_jsonb(v)::text ~ ''secret'') FROM redrive.%I AS v', CASE view WHEN 'throughput' THEN 'count(DISTINCT handler)' ELSE 'count(*)' END, view) INTO total, secrets;
        RETURN NEXT;
    END LOOP;
END
$$;
-- What of it a role could find in the tables behind the views.
CREATE FUNCTION secrets_in_tables() RETURNS TABLE (relation text, secrets bigint) LANGUAGE plpgsql AS $$
BEGIN
    FOR relation IN SELECT c.relname FROM pg_class AS c WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition LOOP
        BEGIN
            EXECUTE format('SELECT count(*) FROM redrive.%I AS v WHERE to_jsonb(v)::text ~ ''secret''', relation) INTO secrets;
        EXCEPTION WHEN insufficient_privilege THEN
            secrets := 0;
        END;
        IF secrets > 0 THEN
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
SET SESSION AUTHORIZATION regress_views_a;
SELECT * FROM seen();
-- A member sees the same, another tenant nothing but the passes.
SET SESSION AUTHORIZATION regress_views_member;
SELECT * FROM seen();
SET SESSION AUTHORIZATION regress_views_b;
SELECT * FROM seen();
SELECT * FROM secrets_in_tables();
SELECT count(*) FROM redrive.stale_batches_at('2100-01-01');
SELECT count(*) FROM redrive.verify();
-- A monitor sees all rows, and neither payloads, keys nor messages.
SET SESSION AUTHORIZATION regress_views_monitor;
SELECT * FROM seen();
SELECT * FROM secrets_in_tables();
SELECT p.label, f.item_no, f.key, f.state, f.reason, f.error_class, f.sqlstate, f.message, f.detail, f.hint, f.context, f.constraint_name, f.retry_count FROM redrive.failed_items AS f JOIN redrive.batch_progress AS p USING (batch_id) ORDER BY f.batch_id, f.item_no;
SELECT handler, sqlstate, sample_message, items FROM redrive.failure_groups ORDER BY sqlstate;
SELECT item_no, key, state FROM redrive.item_status ORDER BY batch_id, item_no LIMIT 3;
SELECT count(*) > 0 AS verified FROM redrive.verify();
SELECT count(*) > 0 AS stale FROM redrive.stale_batches_at('2100-01-01');
SELECT count(*) AS pause_reasons FROM redrive.batch_progress WHERE pause_reason IS NOT NULL;
-- It may do nothing.
SELECT fails($$SELECT redrive.create_handler('monitor', 'take')$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1']::jsonb[])$$);
SELECT fails($$SELECT redrive.rescue_stale()$$);
SELECT fails($$SELECT payloads FROM redrive.item_blocks$$);
SELECT fails($$SELECT message FROM redrive.failures$$);
SELECT fails($$SELECT key FROM redrive.locks$$);
SELECT fails($$SELECT * FROM redrive._items(0::smallint, 1, 1, 10)$$);
-- Conditions that would leak what is hidden do not see it.
CREATE FUNCTION pg_temp.leak(value text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS $$ BEGIN RAISE NOTICE 'leaked: %', value; RETURN true; END $$;
SET SESSION AUTHORIZATION regress_views_b;
SELECT count(*) FROM redrive.failed_items WHERE pg_temp.leak(message);
SELECT count(*) FROM redrive.items WHERE pg_temp.leak(payload::text);
SELECT count(*) FROM redrive.batch_progress WHERE pg_temp.leak(label);
-- A user may neither run passes nor touch tables, nor call what is internal.
SELECT fails($$SELECT redrive.retry_failed()$$);
SELECT fails($$CALL redrive.run_pass('purge')$$);
SELECT fails($$SELECT redrive.set_retention('1 day')$$);
SELECT fails($$UPDATE redrive.batches SET failed = 0$$);
SELECT fails($$INSERT INTO redrive.classification_rules (error_class, action) VALUES ('mine', 'ignore')$$);
SELECT fails($$SELECT redrive._cancel_batch(10, 1)$$);
SELECT fails($$SELECT redrive._create_handler(10, NULL, 'h', 'f', 'row', 1, NULL, 1, '1 s', '1 s', '1 s', '1 s', NULL, 'item', '1 s', NULL, NULL, NULL, NULL, false)$$);
SELECT fails($$SELECT redrive._fold(1)$$);
SELECT fails($$SELECT redrive._wake(10)$$);
SELECT fails($$SELECT redrive.grant_user('regress_views_b')$$);
SELECT fails($$SELECT redrive.grant_monitor('regress_views_b')$$);
RESET SESSION AUTHORIZATION;

-- Rights: given twice is fine; unknown roles and NULL are not; taken back all.
SELECT redrive.grant_user('regress_views_a');
SELECT redrive.grant_monitor('regress_views_monitor');
SELECT fails($$SELECT redrive.grant_user('regress_views_nobody')$$);
SELECT fails($$SELECT redrive.grant_user(NULL)$$);
SELECT fails($$SELECT redrive.grant_user('public')$$);
SELECT fails($$SELECT redrive.grant_monitor('regress_views_nobody')$$);
SELECT fails($$SELECT redrive.grant_monitor(NULL)$$);
SELECT fails($$SELECT redrive.grant_monitor('public')$$);
SELECT fails($$SELECT redrive.revoke_user('regress_views_nobody')$$);
SELECT fails($$SELECT redrive.revoke_user(NULL)$$);
-- One may be both.
SELECT redrive.grant_monitor('regress_views_b');
SET SESSION AUTHORIZATION regress_views_b;
SELECT view, total > 0 AS some, secrets FROM seen() WHERE view = 'failed_items';
SELECT redrive.create_handler('of b', 'take');
RESET SESSION AUTHORIZATION;
SELECT redrive.revoke_user('regress_views_b');
SELECT redrive.revoke_user('regress_views_b');
SELECT redrive.revoke_user('regress_views_monitor');
SET SESSION AUTHORIZATION regress_views_b;
SELECT fails('SELECT count(*) FROM redrive.batch_progress');
SELECT fails($$SELECT redrive.submit('of b', ARRAY['1']::jsonb[])$$);
RESET SESSION AUTHORIZATION;
SELECT r, has_schema_privilege(r, 'redrive', 'USAGE') AS schema, has_table_privilege(r, 'redrive.batches', 'SELECT') AS batches, has_table_privilege(r, 'redrive.failed_items', 'SELECT') AS view,
    has_function_privilege(r, 'redrive.verify(bigint)', 'EXECUTE') AS verify
FROM unnest(ARRAY['regress_views_a', 'regress_views_b', 'regress_views_monitor']) AS r ORDER BY r;
-- Its handlers stay.
SELECT name, owner FROM redrive.handlers ORDER BY name;
DELETE FROM redrive.callbacks;
SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE state NOT IN ('finished', 'cancelled') ORDER BY batch_id \g /dev/null
SELECT redrive.drop_handler(name) FROM redrive.handlers ORDER BY name \g /dev/null
DROP OWNED BY regress_views_a, regress_views_b, regress_views_member, regress_views_monitor;
DROP ROLE regress_views_a, regress_views_b, regress_views_member, regress_views_monitor;
