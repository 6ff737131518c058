-- Does a worker keep the contract of docs/workers.md?  See setup.sql.
--
-- Submits batches, waits for what the worker makes of them, and compares the
-- ledger and the worker's own rows with what they have to be.  Prints a line for
-- each check and fails if one did.  -v patience='5 min' waits longer than a minute
-- for each thing, on a slow machine.
\set QUIET on
\set ON_ERROR_STOP on
\pset format unaligned
\pset tuples_only on
SET client_min_messages = warning;
\o /dev/null
\if :{?patience}
\else
\set patience '1 min'
\endif
SELECT set_config('conformance.patience', :'patience', false);

CREATE TEMP TABLE results (check_no int GENERATED ALWAYS AS IDENTITY, ok boolean NOT NULL, name text NOT NULL);
CREATE FUNCTION pg_temp.expect(name text, actual text, expected text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO results (ok, name)
    VALUES (actual IS NOT DISTINCT FROM expected,
        name || CASE WHEN actual IS DISTINCT FROM expected THEN format(': expected %s, got %s', expected, coalesce(actual, 'nothing')) ELSE '' END);
END
$$;
-- Wait until a query says true, not for ever.
CREATE PROCEDURE pg_temp.await(name text, condition text) LANGUAGE plpgsql AS $$
DECLARE
    v_until timestamptz := clock_timestamp() + current_setting('conformance.patience')::interval;
    v_true boolean := false;
BEGIN
    LOOP
        EXECUTE condition INTO v_true;
        EXIT WHEN v_true OR clock_timestamp() > v_until;
        COMMIT;
        PERFORM pg_sleep(0.02);
    END LOOP;
    PERFORM pg_temp.expect(name, CASE WHEN v_true THEN 'in time' END, 'in time');
END
$$;
-- Submit one item for each number, with its number as key.
CREATE FUNCTION pg_temp.submit(label text, numbers int[]) RETURNS bigint LANGUAGE sql AS $$
    SELECT redrive.submit('conformance', array_agg(jsonb_build_object('n', n) ORDER BY place), array_agg($1 || ' ' || place ORDER BY place), label => $1)
    FROM unnest($2) WITH ORDINALITY AS u (n, place)
$$;
CREATE FUNCTION pg_temp.batch(label text) RETURNS bigint LANGUAGE sql AS 'SELECT max(b.batch_id) FROM redrive.batch_progress AS b WHERE b.label = $1';
CREATE FUNCTION pg_temp.counts(label text) RETURNS text LANGUAGE sql AS $$
    SELECT format('%s: %s succeeded, %s ignored, %s failed, %s cancelled', b.state, b.succeeded, b.ignored, b.failed, b.cancelled)
    FROM redrive.batch_progress AS b WHERE b.batch_id = pg_temp.batch($1)
$$;
CREATE FUNCTION pg_temp.done(label text) RETURNS text LANGUAGE sql AS $$
    SELECT format('%s rows, %s items, sum %s', count(*), count(DISTINCT d.item_no), coalesce(sum(d.result), 0))
    FROM conformance.done AS d WHERE d.batch_id = pg_temp.batch($1)
$$;

-- Good items, more than one claim of them: each done once, with its result.
SELECT pg_temp.submit('good', ARRAY(SELECT n FROM generate_series(1, 60) AS n));
CALL pg_temp.await('good items are done', $$SELECT state = 'finished' FROM redrive.batch_progress WHERE batch_id = pg_temp.batch('good')$$);
SELECT pg_temp.expect('good items succeed', pg_temp.counts('good'), 'finished: 60 succeeded, 0 ignored, 0 failed, 0 cancelled');
SELECT pg_temp.expect('each has one row with its result', pg_temp.done('good'), '60 rows, 60 items, sum 73810');

-- Bad items among good ones: the good ones succeed, the others get what their error means.
SELECT redrive.submit('conformance', ARRAY['{"n": 1}', '{"n": "one"}', '{}', '{"n": 150}', '{"n": 2}', '{"n": 250}', '{"n": 350}', '{"n": 450}', '{"n": 3}']::jsonb[],
    ARRAY(SELECT 'bad ' || n FROM generate_series(1, 9) AS n), label => 'bad');
SELECT redrive.submit('conformance', ARRAY['{"n": -5}', '{"n": 1.5}', '{"n": true}', '{"n": null}', '[1]', '5', 'null']::jsonb[], label => 'odd');
CALL pg_temp.await('bad items are done', $$SELECT state = 'finished' FROM redrive.batch_progress WHERE batch_id = pg_temp.batch('bad')$$);
SELECT pg_temp.expect('good items among bad ones succeed', pg_temp.counts('bad'), 'finished: 4 succeeded, 1 ignored, 4 failed, 0 cancelled');
SELECT pg_temp.expect('what failed has left no row', pg_temp.done('bad'), '4 rows, 4 items, sum 62514');
SELECT pg_temp.expect('outcomes', (SELECT string_agg(format('%s %s %s', f.item_no, f.state, f.sqlstate), ', ' ORDER BY f.item_no)
        FROM redrive.failed_items AS f WHERE f.batch_id = pg_temp.batch('bad')),
    '2 failed E-INPUT, 3 failed E-INPUT, 4 ignored RD001, 7 failed CF001, 8 failed 23514');
SELECT pg_temp.expect('messages', (SELECT string_agg(f.message, ', ' ORDER BY f.item_no)
        FROM redrive.failed_items AS f WHERE f.batch_id = pg_temp.batch('bad') AND f.item_no IN (4, 7)), '150 is of no use, 350 is not possible now');
SELECT pg_temp.expect('a retry has its attempt', (SELECT d.attempt::text FROM conformance.done AS d WHERE d.batch_id = pg_temp.batch('bad') AND d.item_no = 6), '2');
SELECT pg_temp.expect('retries are used up', (SELECT format('%s after %s', f.reason, f.retry_count)
        FROM redrive.failed_items AS f WHERE f.batch_id = pg_temp.batch('bad') AND f.item_no = 7), 'exhausted after 2');

-- Other numbers, and payloads that are no object.
CALL pg_temp.await('odd items are done', $$SELECT state = 'finished' FROM redrive.batch_progress WHERE batch_id = pg_temp.batch('odd')$$);
SELECT pg_temp.expect('odd items: one succeeds', pg_temp.done('odd'), '1 rows, 1 items, sum 25');
SELECT pg_temp.expect('odd items: the others fail', (SELECT string_agg(format('%s %s %s', f.item_no, f.state, f.sqlstate), ', ' ORDER BY f.item_no)
        FROM redrive.failed_items AS f WHERE f.batch_id = pg_temp.batch('odd')),
    '2 failed E-INPUT, 3 failed E-INPUT, 4 failed E-INPUT, 5 failed E-INPUT, 6 failed E-INPUT, 7 failed E-INPUT');

-- A claim that is taken away while the worker is busy: it must not write anything
-- for it, has to go on, and all is done once.
SELECT pg_advisory_lock(5000);
SELECT pg_temp.submit('late', ARRAY[10, 11, 5000]);
CALL pg_temp.await('a worker is busy with a claim', $$SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND objid = 5000 AND NOT granted$$);
-- not by a pass, which would take the claims of all handlers
SELECT redrive._give_back(c.chunk_id, c.lease_token, true) FROM redrive.chunks AS c WHERE c.batch_id = pg_temp.batch('late') AND c.state = 'running';
SELECT pg_temp.expect('its claim is taken away', (SELECT count(*)::text FROM redrive.chunks AS c
        WHERE c.batch_id = pg_temp.batch('late') AND c.rescue_count = 1), '1');
SELECT pg_advisory_unlock(5000);
CALL pg_temp.await('the worker goes on', $$SELECT state = 'finished' FROM redrive.batch_progress WHERE batch_id = pg_temp.batch('late')$$);
SELECT pg_temp.expect('nothing is lost', pg_temp.counts('late'), 'finished: 3 succeeded, 0 ignored, 0 failed, 0 cancelled');
SELECT pg_temp.expect('nothing is done twice', pg_temp.done('late'), '3 rows, 3 items, sum 25000221');

-- A batch that is cancelled while the worker is busy with it comes to its end.
SELECT pg_advisory_lock(5000);
SELECT pg_temp.submit('cancelled', ARRAY[5000, 12]);
CALL pg_temp.await('a worker is busy with another claim', $$SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND objid = 5000 AND NOT granted$$);
SELECT redrive.cancel_batch(pg_temp.batch('cancelled'));
SELECT pg_advisory_unlock(5000);
CALL pg_temp.await('a cancelled batch comes to its end', $$SELECT finished_at IS NOT NULL FROM redrive.batch_progress WHERE batch_id = pg_temp.batch('cancelled')$$);
SELECT pg_temp.expect('what succeeded has its rows', (SELECT b.succeeded::text FROM redrive.batch_progress AS b WHERE b.batch_id = pg_temp.batch('cancelled')),
    (SELECT count(*)::text FROM conformance.done AS d WHERE d.batch_id = pg_temp.batch('cancelled')));

-- The worker waits for more.
SELECT pg_temp.submit('last', ARRAY[7]);
CALL pg_temp.await('the worker is there at the end', $$SELECT state = 'finished' FROM redrive.batch_progress WHERE batch_id = pg_temp.batch('last')$$);
SELECT pg_temp.expect('no key is locked', (SELECT count(*)::text FROM redrive.locks AS l JOIN redrive.handlers AS h USING (handler_id) WHERE h.name = 'conformance'), '0');
SELECT pg_temp.expect('all counters agree', (SELECT coalesce(string_agg(v.check_name, ', '), 'yes') FROM redrive.verify() AS v WHERE NOT v.ok), 'yes');

\o
SELECT CASE WHEN r.ok THEN 'ok      ' ELSE 'FAILED  ' END || r.name FROM results AS r ORDER BY r.check_no;
SELECT count(*) FILTER (WHERE r.ok) || ' passed, ' || count(*) FILTER (WHERE NOT r.ok) || ' failed' FROM results AS r;
DO $$
BEGIN
    IF EXISTS (SELECT FROM results AS r WHERE NOT r.ok) THEN
        RAISE EXCEPTION 'the worker does not keep the contract';
    END IF;
END
$$;
