-- Verify: every check holds in each situation, and each fails when what it
-- checks is tampered with.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    CASE item.payload ->> 0
        WHEN 'fail' THEN RAISE EXCEPTION 'told to' USING ERRCODE = '22000';
        WHEN 'ignore' THEN PERFORM redrive.raise_validation('told to');
        WHEN 'wait' THEN RAISE EXCEPTION 'told to';
        WHEN 'pause' THEN PERFORM redrive.pause_batch(item.batch_id);
        ELSE NULL;
    END CASE;
END
$$;
SELECT redrive.create_handler('h', 'take', retry_delay => '1 h', isolation => 'item');
SELECT * FROM redrive.verify();
SELECT * FROM redrive.verify(-1);

-- One batch in each state, with every kind of outcome where it can be.
\set outcomes 'ARRAY[''["good"]'', ''["fail"]'', ''["ignore"]'', ''["wait"]'', ''["good"]'']::jsonb[]'
SELECT redrive.open_batch('h', label => 'open') > 0 AS made;
SELECT redrive.add_items(batch('open'), :outcomes, ARRAY['o1', 'o2', NULL, 'o4', NULL]);
SELECT redrive.submit('h', :outcomes, ARRAY['r1', 'r2', NULL, 'r4', NULL], label => 'retrying') > 0 AS made;
SELECT redrive.submit('h', ARRAY['["wait"]', '["good"]', '["pause"]', '["good"]', '["fail"]']::jsonb[], ARRAY['p1', 'p2', 'p3', 'p4', NULL], label => 'paused') > 0 AS made;
SELECT redrive.submit('h', :outcomes, ARRAY['c1', 'c2', NULL, 'c4', NULL], label => 'cancelled') > 0 AS made;
SELECT redrive.submit('h', ARRAY['["good"]', '["fail"]', '["ignore"]']::jsonb[], ARRAY['f1', 'f2', NULL], label => 'finished') > 0 AS made;
SELECT redrive.seal_batch(redrive.open_batch('h', label => 'empty'));
CALL redrive.work();
SELECT redrive.cancel_batch(batch('cancelled'));
SELECT redrive.submit('h', :outcomes, ARRAY['a1', 'a2', NULL, 'a4', NULL], label => 'ready') > 0 AS made;
SELECT * FROM progress;
-- All checks, and all true.
SELECT check_name, count(*) AS batches, count(*) FILTER (WHERE ok) AS ok, count(*) FILTER (WHERE expected IS DISTINCT FROM actual) AS differ FROM redrive.verify() GROUP BY check_name ORDER BY check_name COLLATE "C";
SELECT count(DISTINCT v.batch_id) AS batches FROM redrive.verify() AS v;
SELECT check_name, expected, actual, ok FROM redrive.verify(batch('paused')) ORDER BY check_name COLLATE "C";
SELECT count(*) = (SELECT count(*) FROM redrive.verify() WHERE batch_id = batch('retrying')) AS same FROM redrive.verify(batch('retrying'));
SELECT * FROM broken;

-- Tampered with: each change is found, by which checks.
CREATE FUNCTION after(label text, tampering text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    v_found text;
BEGIN
    BEGIN
        SET LOCAL session_replication_role = replica;
        EXECUTE format(tampering, scratch.batch(label));
        SELECT string_agg(format('%s %s/%s', v.check_name, v.expected, v.actual), ', ' ORDER BY v.check_name COLLATE "C") INTO v_found FROM redrive.verify() AS v WHERE NOT v.ok;
        RAISE EXCEPTION 'roll back' USING ERRCODE = 'ZZ999';
    EXCEPTION WHEN SQLSTATE 'ZZ999' THEN
        RETURN coalesce(v_found, 'NOT FOUND');
    END;
END
$$;
SELECT after('retrying', 'UPDATE redrive.batches SET succeeded = succeeded + 1 WHERE batch_id = %s');
SELECT after('retrying', 'UPDATE redrive.batches SET ignored = ignored - 1 WHERE batch_id = %s');
SELECT after('retrying', 'UPDATE redrive.batches SET failed = failed + 1 WHERE batch_id = %s');
SELECT after('retrying', 'UPDATE redrive.batches SET waiting = waiting + 1 WHERE batch_id = %s');
SELECT after('cancelled', 'UPDATE redrive.batches SET cancelled = cancelled - 1 WHERE batch_id = %s');
SELECT after('ready', 'UPDATE redrive.batches SET total = total + 1 WHERE batch_id = %s');
SELECT after('paused', 'UPDATE redrive.batches SET claimed_to = claimed_to - 1 WHERE batch_id = %s');
-- Two that make up for each other in the sum.
SELECT after('finished', 'UPDATE redrive.batches SET succeeded = succeeded + 1, failed = failed - 1 WHERE batch_id = %s');
SELECT after('finished', 'UPDATE redrive.batches SET succeeded = 5, failed = -3 WHERE batch_id = %s');
-- Items, failures, chunks, locks.
SELECT after('ready', 'DELETE FROM redrive.item_blocks WHERE batch_id = %s');
SELECT after('ready', 'UPDATE redrive.item_blocks SET items = items - 1 WHERE batch_id = %s');
SELECT after('ready', 'UPDATE redrive.item_blocks SET first_no = first_no + 1 WHERE batch_id = %s');
SELECT after('retrying', 'DELETE FROM redrive.failures WHERE state = ''failed'' AND batch_id = %s');
SELECT after('retrying', 'DELETE FROM redrive.failures WHERE state = ''waiting'' AND batch_id = %s');
SELECT after('retrying', 'UPDATE redrive.failures SET state = ''ignored'', next_attempt_at = NULL WHERE state = ''waiting'' AND batch_id = %s');
SELECT after('finished', 'DELETE FROM redrive.failures WHERE state = ''failed'' AND batch_id = %s');
SELECT after('finished', 'UPDATE redrive.failures SET state = ''waiting'', reason = NULL WHERE state = ''failed'' AND batch_id = %s');
SELECT after('retrying', 'SELECT redrive._take_up(b, ARRAY[4]::bigint[], NULL, NULL, NULL) FROM redrive.batches AS b WHERE batch_id = %s');
SELECT after('retrying', 'DO $d$ BEGIN PERFORM redrive._take_up(b, ARRAY[4]::bigint[], NULL, NULL, NULL) FROM redrive.batches AS b WHERE batch_id = %s; UPDATE redrive.retry_lists SET item_nos = ''{}''; END $d$');
SELECT after('paused', 'DELETE FROM redrive.chunks WHERE batch_id = %s');
SELECT after('paused', 'UPDATE redrive.chunks SET done = done - 1 WHERE done > 0 AND batch_id = %s');
SELECT after('paused', 'UPDATE redrive.chunks SET done_to = done_to + 1 WHERE state = ''orphaned'' AND batch_id = %s');
SELECT after('finished', 'INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, claimed_at, progress_at, finished_at) SELECT batch_id, handler_id, part, 1, ''first'', ''done'', 1, 1, 1, 0, now(), now(), now() FROM redrive.batches WHERE batch_id = %s');
SELECT after('finished', 'UPDATE redrive.chunks SET folded = false WHERE batch_id = %s');
SELECT after('finished', 'INSERT INTO redrive.locks (handler_id, key, batch_id, item_no) VALUES (1, ''f1'', %s, 1)');
SELECT after('ready', 'DELETE FROM redrive.locks WHERE key = ''a1'' AND batch_id = %s');
SELECT after('retrying', 'DELETE FROM redrive.locks WHERE key = ''r4'' AND batch_id = %s');
-- Nothing is left of that.
SELECT * FROM broken;

-- What others own is not verified.
CREATE ROLE regress_verify_a LOGIN;
SELECT redrive.grant_user('regress_verify_a');
SET SESSION AUTHORIZATION regress_verify_a;
SELECT count(*) FROM redrive.verify();
SELECT count(*) FROM redrive.verify(batch('ready'));
RESET SESSION AUTHORIZATION;
DROP OWNED BY regress_verify_a;
DROP ROLE regress_verify_a;
