-- Canary: some of the failed items run first, the others follow if enough of
-- these succeed.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

-- Fails until the item is mended: '"x"' with an error that is final, '"r"' with
-- one that is retried.
CREATE TABLE done (place int GENERATED ALWAYS AS IDENTITY, batch_id bigint, item_no bigint);
CREATE TABLE mended (item_no bigint);
CREATE TABLE ended (batch_id bigint, run_no int);
CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO scratch.done (batch_id, item_no) VALUES (item.batch_id, item.item_no);
    IF item.item_no NOT IN (SELECT m.item_no FROM scratch.mended AS m) THEN
        IF item.payload = '"r"' THEN
            RAISE EXCEPTION 'not mended';
        ELSIF item.payload = '"p"' THEN
            RAISE EXCEPTION 'not mended' USING ERRCODE = '42P01';
        ELSIF item.payload = '"v"' THEN
            PERFORM redrive.raise_validation('not valid');
        END IF;
        RAISE EXCEPTION 'not mended' USING ERRCODE = CASE item.payload WHEN '"y"' THEN '22001' ELSE '22000' END;
    END IF;
END
$$;
CREATE FUNCTION note_end(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS 'INSERT INTO scratch.ended SELECT $1, $2';
SELECT redrive.create_handler('h', 'take', max_retries => 0, on_finish => 'note_end');
CREATE FUNCTION why(label text) RETURNS TABLE (fact text, detail text, remedy text) LANGUAGE sql AS $$
    SELECT w.fact, w.detail, w.remedy FROM redrive.why(scratch.batch(label)) AS w WHERE w.fact ~ 'canary|keys'
$$;
-- Ten failed items, all of payload p_kind.
CREATE PROCEDURE ten(label text, p_kind jsonb, keys text[] DEFAULT NULL) LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM scratch.mended;
    PERFORM redrive.submit('h', array_fill(p_kind, ARRAY[10]), keys, label => label);
END
$$;
CREATE VIEW states AS
SELECT p.label, string_agg(left(i.state, 1), '' ORDER BY i.item_no) AS items
FROM redrive.batch_progress AS p JOIN redrive.item_status AS i USING (batch_id) GROUP BY p.label;

-- Enough succeed: three run first, and then the seven, in the same run.
CALL ten('good', '"x"');
CALL redrive.work();
INSERT INTO mended SELECT generate_series(1, 10);
TRUNCATE done;
SELECT redrive.redrive(batch('good'), canary => 3);
SELECT * FROM progress WHERE label = 'good';
SELECT items FROM states WHERE label = 'good';
SELECT * FROM why('good');
SELECT * FROM broken;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'good';
SELECT string_agg(item_no::text, ' ' ORDER BY place) AS canary FROM (SELECT * FROM done ORDER BY place LIMIT 3) AS d;
SELECT count(*), count(DISTINCT item_no) FROM done;
SELECT run_no FROM ended WHERE batch_id = batch('good') ORDER BY run_no;
SELECT * FROM why('good');
SELECT * FROM broken;

-- Too few: the seven are not touched, and the run ends.
CALL ten('bad', '"x"');
CALL redrive.work();
TRUNCATE done;
INSERT INTO mended VALUES (1), (2), (4), (5), (10);
SELECT redrive.redrive(batch('bad'), canary => 3);
CALL redrive.work();
SELECT * FROM progress WHERE label = 'bad';
SELECT items FROM states WHERE label = 'bad';
SELECT string_agg(item_no::text, ' ' ORDER BY item_no) AS ran FROM done;
SELECT run_no FROM ended WHERE batch_id = batch('bad') ORDER BY run_no;
SELECT * FROM why('bad');
SELECT * FROM broken;
-- Again with what is left, of which two thirds succeed: with less asked for, they follow.
TRUNCATE done;
SELECT redrive.redrive(batch('bad'), canary => 3, canary_ratio => 0.6);
SELECT * FROM why('bad');
CALL redrive.work();
SELECT items FROM states WHERE label = 'bad';
SELECT count(*) FROM done;
SELECT * FROM why('bad');
SELECT * FROM broken;

-- It waits for retries of the canary, as long as these may make it succeed.
SELECT redrive.alter_handler('h', max_retries => 1, retry_delay => '1 h');
CALL ten('retry', '"r"');
CALL redrive.work();
CALL make_due();
CALL redrive.work();
SELECT items FROM states WHERE label = 'retry';
INSERT INTO mended VALUES (2);
SELECT redrive.redrive(batch('retry'), canary => 2);
CALL redrive.work();
SELECT * FROM progress WHERE label = 'retry';
SELECT items FROM states WHERE label = 'retry';
SELECT fact, detail FROM why('retry');
INSERT INTO mended SELECT generate_series(1, 10);
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'retry';
SELECT * FROM broken;
-- Decided as soon as it is clear: the second succeeded, that is half.
CALL ten('early', '"r"');
CALL redrive.work();
CALL make_due();
CALL redrive.work();
INSERT INTO mended SELECT generate_series(2, 10);
SELECT redrive.redrive(batch('early'), canary => 2, canary_ratio => 0.5);
CALL redrive.work();
SELECT * FROM progress WHERE label = 'early';
SELECT items FROM states WHERE label = 'early';
SELECT * FROM why('early');
-- A canary that waits too long has failed; it is not taken for a held item.
CALL ten('expired', '"r"');
CALL redrive.work();
CALL make_due();
CALL redrive.work();
SELECT redrive.redrive(batch('expired'), canary => 2, canary_ratio => 0.5);
CALL redrive.work();
SELECT outcome FROM redrive.retry_failed(now() + interval '25 h');
SELECT * FROM progress WHERE label = 'expired';
SELECT fact, detail FROM why('expired');
SELECT * FROM broken;
SELECT redrive.alter_handler('h', max_retries => 0);

-- An item that is ignored did not succeed.
SELECT redrive.submit('h', ARRAY['"x"', '"x"', '"x"']::jsonb[], label => 'ignored') > 0 AS submitted;
CALL redrive.work();
UPDATE redrive.item_blocks SET payloads = ARRAY['"v"', '"x"', '"x"']::jsonb[] WHERE batch_id = batch('ignored');
DELETE FROM mended;
SELECT redrive.redrive(batch('ignored'), canary => 1);
CALL redrive.work();
SELECT * FROM progress WHERE label = 'ignored';
SELECT fact, detail FROM why('ignored');

-- Only what was chosen follows: by error class, fingerprint, numbers.
SELECT redrive.submit('h', ARRAY['"x"', '"y"', '"x"', '"y"', '"x"', '"y"']::jsonb[], label => 'chosen') > 0 AS submitted;
CALL redrive.work();
INSERT INTO mended SELECT generate_series(1, 10);
SELECT fingerprint AS y FROM redrive.failed_items WHERE batch_id = batch('chosen') AND item_no = 2 \gset
SELECT redrive.redrive(batch('chosen'), fingerprint => :'y', canary => 1);
CALL redrive.work();
SELECT items FROM states WHERE label = 'chosen';
SELECT redrive.redrive(batch('chosen'), error_class => 'data', item_nos => ARRAY[5, 3, 2], canary => 1);
SELECT items FROM states WHERE label = 'chosen';
CALL redrive.work();
SELECT items FROM states WHERE label = 'chosen';
-- As many as there are, or more: no canary, they just run.
SELECT redrive.redrive(batch('chosen'), canary => 1);
SELECT * FROM why('chosen');
CALL redrive.work();
SELECT * FROM progress WHERE label = 'chosen';

-- Keys: those of held items stay free until they follow; one that another batch
-- has meanwhile keeps its item failed.
CALL ten('keys', '"x"', ARRAY['k01', 'k02', 'k03', 'k04', 'k05', 'k06', 'k07', 'k08', 'k09', 'k10']);
CALL redrive.work();
SELECT count(*) AS locks FROM redrive.locks;
SELECT redrive.redrive(batch('keys'), canary => 2);
SELECT string_agg(key, ' ' ORDER BY key) AS locks FROM redrive.locks;
SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], ARRAY['k05', 'k06'], run_at => now() + interval '1 h', label => 'taker') > 0 AS submitted;
INSERT INTO mended SELECT generate_series(1, 10);
SELECT * FROM broken;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'keys';
SELECT items FROM states WHERE label = 'keys';
SELECT fact, regexp_replace(detail, 'example \d+', 'example N') AS detail FROM why('keys');
SELECT string_agg(key, ' ' ORDER BY key) AS locks FROM redrive.locks;
SELECT * FROM broken;
-- A key of the canary itself: refused, as without one.
SELECT fails(format('SELECT redrive.redrive(%s, canary => 1)', batch('keys')));
SELECT redrive.cancel_batch(batch('taker'));
SELECT redrive.redrive(batch('keys'), canary => 1);
CALL redrive.work();
SELECT * FROM progress WHERE label = 'keys';
SELECT * FROM why('keys');

-- What decides is lost in a crash and done again by the pass, once.
-- Seen red: without _judge_canary in _fold nothing but the canary runs.
CALL ten('crash', '"x"');
CALL redrive.work();
INSERT INTO mended SELECT generate_series(1, 10);
TRUNCATE done;
SELECT redrive.redrive(batch('crash'), canary => 3);
CREATE FUNCTION crash() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'as if crashed'; END $$;
CREATE TRIGGER crash BEFORE UPDATE ON redrive.canaries FOR EACH ROW EXECUTE FUNCTION crash();
\set VERBOSITY terse
CALL redrive.work();
\set VERBOSITY default
DROP TRIGGER crash ON redrive.canaries;
SELECT * FROM progress WHERE label = 'crash';
SELECT fact, detail FROM why('crash');
SELECT * FROM broken;
SELECT acted FROM redrive.rescue_stale(now() + interval '2 min');
SELECT * FROM progress WHERE label = 'crash';
SELECT acted FROM redrive.rescue_stale(now() + interval '2 min');
CALL redrive.work();
SELECT * FROM progress WHERE label = 'crash';
SELECT count(*), count(DISTINCT item_no) FROM done;
SELECT * FROM broken;

-- Paused in the middle: decided when it goes on.
CALL ten('paused', '"x"');
CALL redrive.work();
UPDATE redrive.item_blocks SET payloads = array_fill('"p"'::jsonb, ARRAY[10]) WHERE batch_id = batch('paused');
SELECT redrive.redrive(batch('paused'), canary => 2);
CALL redrive.work();
SELECT * FROM progress WHERE label = 'paused';
INSERT INTO mended SELECT generate_series(1, 10);
SELECT fact FROM why('paused');
SELECT redrive.resume_batch(batch('paused'));
CALL redrive.work();
SELECT * FROM progress WHERE label = 'paused';

-- Cancelled in the middle: the held items are failed, as they were.
CALL ten('cancelled', '"x"', ARRAY['c01', 'c02', 'c03', 'c04', 'c05', 'c06', 'c07', 'c08', 'c09', 'c10']);
CALL redrive.work();
SELECT redrive.redrive(batch('cancelled'), canary => 2);
SELECT redrive.cancel_batch(batch('cancelled'));
SELECT * FROM progress WHERE label = 'cancelled';
SELECT * FROM why('cancelled');
SELECT count(*) AS locks FROM redrive.locks;
SELECT * FROM broken;

-- While one is not decided: no second one, but all may be run.  Nothing runs twice for it.
CALL ten('both', '"x"');
CALL redrive.work();
INSERT INTO mended SELECT generate_series(1, 9);
TRUNCATE done;
SELECT redrive.redrive(batch('both'), canary => 2);
SELECT fails(format('SELECT redrive.redrive(%s, canary => 1)', batch('both')));
SELECT redrive.redrive(batch('both'), item_nos => ARRAY[3, 4, 10]);
CALL redrive.work();
SELECT * FROM progress WHERE label = 'both';
SELECT count(*), count(DISTINCT item_no) FROM done;
SELECT * FROM why('both');
SELECT * FROM broken;

-- Tolerated failures: whoever redrives some has seen the others.
-- Seen red: with failures_accepted = 0 in _redrive it was paused for the old ones.
SELECT redrive.create_handler('careful', 'take', tolerated_failures => 2, max_retries => 1, retry_delay => '1 h', isolation => 'item');
DELETE FROM mended;
SELECT redrive.submit('careful', ARRAY['"x"', '"x"', '"x"', '"x"', '"x"', '"r"']::jsonb[], label => 'tolerated') > 0 AS submitted;
CALL redrive.work();
SELECT state, pause_reason FROM redrive.batch_progress WHERE label = 'tolerated';
SELECT redrive.resume_batch(batch('tolerated'));
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'tolerated';
INSERT INTO mended VALUES (1);
SELECT redrive.redrive(batch('tolerated'), item_nos => ARRAY[1, 6]);
CALL redrive.work();
SELECT state, pause_reason FROM redrive.batch_progress WHERE label = 'tolerated';
INSERT INTO mended VALUES (6);
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'tolerated';
-- It still counts what fails anew: three of the others.
SELECT redrive.redrive(batch('tolerated'), canary => 4, canary_ratio => 0.1);
UPDATE redrive.item_blocks SET payloads = ARRAY['"x"', '"x"', '"x"', '"x"', '"r"', '"r"']::jsonb[] WHERE batch_id = batch('tolerated');
CALL redrive.work();
SELECT * FROM progress WHERE label = 'tolerated';

-- However small the part, one has to succeed.
CALL ten('least', '"x"');
CALL redrive.work();
SELECT redrive.redrive(batch('least'), canary => 1, canary_ratio => 1e-7);
CALL redrive.work();
SELECT fact, detail FROM why('least');
SELECT run_no, failed FROM redrive.batch_progress WHERE label = 'least';

-- Bad values change nothing.
SELECT x.* FROM unnest(ARRAY['canary => 0', 'canary => -1', 'canary => 1, canary_ratio => 0', 'canary => 1, canary_ratio => 1.01', 'canary => 1, canary_ratio => NULL', 'canary => 1, canary_ratio => ''NaN''']) WITH ORDINALITY AS a (args, n),
    LATERAL fails(format('SELECT redrive.redrive(%s, %s)', batch('bad'), args)) WITH ORDINALITY AS x (answer, line) ORDER BY a.n, x.line;
SELECT fails(format('SELECT redrive.redrive(%s, canary => 1)', batch('good')));
SELECT run_no FROM redrive.batch_progress WHERE label = 'bad';

-- It goes with its batch.
SELECT count(*) > 0 AS canaries FROM redrive.canaries;
UPDATE redrive.batches SET finished_at = now() - interval '1 year', state = 'finished', pause_reason = NULL, claimed_to = total, started_at = coalesce(started_at, now());
UPDATE redrive.rotation SET part = 1;
SELECT acted > 0 AS purged FROM redrive.purge();
SELECT count(*) FROM redrive.canaries;
UPDATE redrive.rotation SET part = 0;
