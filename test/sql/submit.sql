-- Submit: what goes in, how each bad input is answered, and that nothing is
-- left of what was rolled back.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE TABLE done (batch_id bigint, item_no bigint, key text, payload jsonb);
CREATE FUNCTION take(item redrive.item) RETURNS void LANGUAGE sql AS
$$ INSERT INTO scratch.done (batch_id, item_no, key, payload) VALUES (($1).batch_id, ($1).item_no, ($1).key, ($1).payload) $$;
SELECT redrive.create_handler('h', 'take');
SELECT redrive.create_handler('other', 'take');

-- submit: all arguments, and what they become.
SELECT redrive.submit('h', ARRAY['{"a": 1}', 'null', '[]']::jsonb[], ARRAY['k1', NULL, 'k3'], '2040-01-01', 7, 'full', 'once') AS b \gset
SELECT * FROM progress;
SELECT state, total, keyed, priority, run_at = '2040-01-01' AS run_at, idempotency_key, submitted_by = current_user::regrole AS mine,
    sealed_at IS NOT NULL AS sealed, started_at IS NULL AS not_started
FROM redrive.batches;
SELECT item_no, key, payload FROM redrive.items ORDER BY item_no;
SELECT item_no, key, state FROM redrive.item_status ORDER BY item_no;
-- Not before its time.
CALL redrive.work();
SELECT * FROM progress;
SELECT handler, ready, delayed FROM redrive.queue_stats ORDER BY handler;
UPDATE redrive.batches SET run_at = now(), serve_after = now() WHERE label = 'full';
CALL redrive.work();
SELECT item_no, key, payload FROM done ORDER BY item_no;
SELECT * FROM progress;
SELECT * FROM broken;

-- The same idempotency key: the same batch, though it has ended; nothing else.
SELECT redrive.submit('h', ARRAY['9']::jsonb[], idempotency_key => 'once') = :b AS same;
SELECT redrive.submit_query('h', 'SELECT NULL::text, ''9''::jsonb', idempotency_key => 'once') = :b AS same;
SELECT redrive.open_batch('h', idempotency_key => 'once') = :b AS same;
-- Keys of another handler are its own.
SELECT redrive.submit('other', ARRAY['9']::jsonb[], idempotency_key => 'once', label => 'other once') = :b AS same;
SELECT * FROM progress;
SELECT redrive.cancel_batch(batch('other once'));

-- Keys lock: one live item per handler and key.
SELECT redrive.submit('h', ARRAY['1', '2', '3']::jsonb[], ARRAY['a', 'b', NULL], label => 'holder') > 0 AS submitted;
SELECT k, redrive.is_locked('h', k) AS locked, redrive.is_locked('other', k) AS by_other FROM unnest(ARRAY['a', 'b', 'c', NULL]) AS k ORDER BY k;
SELECT fails($$SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], ARRAY['c', 'b'])$$);
SELECT fails($$SELECT redrive.send('h', '1', 'a')$$);
SELECT fails($$SELECT redrive.submit_query('h', $q$SELECT 'a'::text, '1'::jsonb$q$)$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1', '2', '3']::jsonb[], ARRAY['x', 'y', 'x'])$$);
-- Nothing half done: key c is not locked, no batch is there.
SELECT redrive.is_locked('h', 'c') AS c, redrive.is_locked('h', 'x') AS x;
SELECT * FROM progress;
SELECT redrive.submit('other', ARRAY['1']::jsonb[], ARRAY['a'], label => 'other holder') > 0 AS submitted;
CALL redrive.work();
SELECT k, redrive.is_locked('h', k) AS locked FROM unnest(ARRAY['a', 'b']) AS k;
SELECT redrive.submit('h', ARRAY['1']::jsonb[], ARRAY['a'], label => 'a again') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress;
SELECT * FROM broken;
SELECT fails($$SELECT redrive.is_locked('unknown', 'a')$$);
SELECT fails($$SELECT redrive.is_locked(NULL, 'a')$$);
-- A key of NULLs only is no key; an empty key is one.
SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], ARRAY[NULL, NULL], label => 'null keys') > 0 AS submitted;
SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], ARRAY['', NULL], label => 'empty key') > 0 AS submitted;
SELECT redrive.is_locked('h', '') AS locked;
SELECT label, keyed FROM redrive.batches WHERE label IN ('null keys', 'empty key') ORDER BY batch_id;
CALL redrive.work();
SELECT redrive.is_locked('h', '') AS locked;

-- Bad input.
SELECT fails($$SELECT redrive.submit('unknown', ARRAY['1']::jsonb[])$$);
SELECT fails($$SELECT redrive.submit(NULL, ARRAY['1']::jsonb[])$$);
SELECT fails($$SELECT redrive.submit('h', NULL)$$);
SELECT fails($$SELECT redrive.submit('h', '{}')$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1', NULL, '3']::jsonb[])$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], ARRAY['a'])$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1']::jsonb[], ARRAY['a', 'b'])$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1']::jsonb[], '{}')$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY[['1', '2'], ['3', '4']]::jsonb[])$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[], ARRAY[['a'], ['b']])$$);
BEGIN;
SELECT redrive.submit('h', '[5:6]={1,2}', '[0:1]={low,lower}', label => 'bounds') > 0 AS submitted;
SELECT item_no, key, payload FROM redrive.items WHERE batch_id = batch('bounds') ORDER BY item_no;
ROLLBACK;
SELECT fails($$SELECT redrive.submit('h', ARRAY['1']::jsonb[], run_at => 'infinity')$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1']::jsonb[], run_at => '-infinity')$$);
SELECT fails($$SELECT redrive.submit('h', ARRAY['1']::jsonb[], run_at => '294276-12-31 23:30+00')$$);
SELECT fails(format('SELECT redrive.submit(''h'', ARRAY[''1'']::jsonb[], ARRAY[%L])', repeat('x', 1025)));
SELECT fails(format('SELECT redrive.send(''h'', ''1'', %L)', repeat('é', 513)));
SELECT fails(format('SELECT redrive.submit(''h'', ARRAY[''1'']::jsonb[], idempotency_key => %L)', repeat('é', 513)));
SELECT fails(format('SELECT redrive.submit_query(''h'', ''nonsense'', idempotency_key => %L)', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 1000) AS i)));
SELECT fails(format('SELECT redrive.open_batch(''h'', idempotency_key => %L)', repeat('x', 1025)));
-- The longest key works, and so does one that the index could compress.
SELECT redrive.submit('h', ARRAY['1', '2']::jsonb[],
    ARRAY[(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 32) AS i), repeat('x', 1024)], label => 'long keys', idempotency_key => repeat('x', 1024)) > 0 AS submitted;
CALL redrive.work();
SELECT item_no, length(key) FROM done WHERE batch_id = batch('long keys') ORDER BY item_no;
SELECT * FROM progress WHERE label = 'long keys';
-- Arrays that do not start at 1.
SELECT redrive.submit('h', '[5:6]={1,2}', '[0:1]={lower,bounds}', label => 'bounds') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, key, payload FROM done WHERE batch_id = batch('bounds') ORDER BY item_no;
-- NULL for arguments with a default.
SELECT redrive.submit('h', ARRAY['1']::jsonb[], NULL, NULL, NULL, 'nulls', NULL) > 0 AS submitted;
SELECT priority, run_at <= now() AS due, idempotency_key FROM redrive.batches WHERE label = 'nulls';
CALL redrive.work();

-- Big payloads: one of 10 MB, alone and between small ones.
SELECT redrive.submit('h', ARRAY['"before"', to_jsonb(repeat('0123456789', 1024 * 1024)), '"after"']::jsonb[], label => 'big') > 0 AS submitted;
SELECT redrive.send('h', jsonb_build_object('big', (SELECT jsonb_agg(md5(i::text)) FROM generate_series(1, 300000) AS i))) AS sent \gset
CALL redrive.work();
SELECT item_no, length(payload::text), payload = to_jsonb(repeat('0123456789', 1024 * 1024)) AS same FROM done WHERE batch_id = batch('big') ORDER BY item_no;
SELECT jsonb_array_length(payload -> 'big') AS elements, payload -> 'big' ->> 299999 = md5('300000') AS same FROM done WHERE batch_id = :sent;
SELECT * FROM broken;
-- Many items: the order is kept, the numbers have no gap.
SELECT redrive.submit('h', array_agg(to_jsonb(i) ORDER BY i), array_agg('m' || i ORDER BY i), label => 'many') > 0 AS submitted FROM generate_series(1, 20000) AS i;
SELECT count(*), min(item_no), max(item_no), bool_and(payload = to_jsonb(item_no) AND key = 'm' || item_no) AS in_order FROM redrive.items WHERE batch_id = batch('many');
CALL redrive.work();
SELECT count(*), count(DISTINCT item_no), bool_and(payload = to_jsonb(item_no) AND key = 'm' || item_no) AS in_order FROM done WHERE batch_id = batch('many');
SELECT * FROM broken;

-- submit_query: columns by place, whatever their names; anything that fits.
SELECT redrive.submit_query('h', 'SELECT CASE WHEN i > 1 THEN ''q'' || i END AS a, to_jsonb(i) AS b FROM generate_series(1, 3000) AS i ORDER BY i',
    NULL, 3, 'query', 'query once') AS q \gset
SELECT total, keyed, state, priority FROM redrive.batches WHERE batch_id = :q;
SELECT count(*), bool_and(payload = to_jsonb(item_no)) AS in_order, count(key) AS keys FROM redrive.items WHERE batch_id = :q;
SELECT redrive.submit_query('h', 'DELETE FROM scratch.done RETURNING NULL, NULL', idempotency_key => 'query once') = :q AS same;
SELECT count(*) > 0 AS not_run FROM done;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'query';
-- Rows that are stored out of line.
CREATE TABLE large AS SELECT i::text AS key, to_jsonb(repeat(md5(i::text), 3000)) AS payload FROM generate_series(1, 20) AS i;
SELECT redrive.submit_query('h', 'SELECT key, payload FROM large ORDER BY key::int', label => 'large') > 0 AS submitted;
CALL redrive.work();
SELECT count(*), bool_and(d.payload = l.payload) AS same FROM done AS d JOIN large AS l ON l.key = d.key WHERE d.batch_id = batch('large');
SELECT fails($$SELECT redrive.submit_query('h', NULL)$$);
SELECT fails($$SELECT redrive.submit_query(NULL, 'SELECT NULL::text, ''1''::jsonb')$$);
SELECT fails($$SELECT redrive.submit_query('unknown', 'SELECT NULL::text, ''1''::jsonb')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT NULL::text, ''1''::jsonb WHERE false')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT NULL::text, CASE WHEN i < 2 THEN ''1''::jsonb END FROM generate_series(1, 2) AS i')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT ''1''::jsonb')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT 1, ''1''::jsonb')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT ''k''::text, ''1''::json')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT ''k''::text, ''1''::jsonb, 1')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT')$$);
SELECT fails($$SELECT redrive.submit_query('h', '')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT 1; SELECT 2')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'CREATE TABLE t (i int)')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'nonsense')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT ''k''::text, to_jsonb(1 / 0)')$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT ''twice'', ''1''::jsonb FROM generate_series(1, 2)')$$);

-- open, add, seal.
SELECT redrive.open_batch('h', NULL, 5, 'opened', 'open once') AS o \gset
SELECT redrive.open_batch('h', idempotency_key => 'open once') = :o AS same;
SELECT redrive.add_items(:o, ARRAY['1', '2']::jsonb[], ARRAY['o1', NULL]);
SELECT redrive.add_items(:o, ARRAY['3']::jsonb[]);
SELECT fails(format('SELECT redrive.add_items(%s, ARRAY[''4'']::jsonb[], ARRAY[''o1''])', :o));
SELECT fails(format('SELECT redrive.add_items(%s, ARRAY[''4'', ''5'']::jsonb[], ARRAY[''o4'', ''o4''])', :o));
-- Nothing runs before it is sealed, but its keys are taken.
CALL redrive.work();
SELECT * FROM progress WHERE label = 'opened';
SELECT redrive.is_locked('h', 'o1') AS o1, redrive.is_locked('h', 'o4') AS o4;
SELECT * FROM broken;
SELECT redrive.add_items(:o, array_agg(to_jsonb(i) ORDER BY i), array_agg('o' || i ORDER BY i)) FROM generate_series(4, 500) AS i;
SELECT redrive.seal_batch(:o);
CALL redrive.work();
SELECT * FROM progress WHERE label = 'opened';
SELECT count(*), bool_and(payload = to_jsonb(item_no)) AS in_order FROM done WHERE batch_id = :o;
SELECT fails(format('SELECT redrive.add_items(%s, ARRAY[''1'']::jsonb[])', :o));
SELECT fails(format('SELECT redrive.seal_batch(%s)', :o));
SELECT fails($$SELECT redrive.add_items(NULL, ARRAY['1']::jsonb[])$$);
SELECT fails($$SELECT redrive.add_items(-1, ARRAY['1']::jsonb[])$$);
SELECT fails($$SELECT redrive.seal_batch(NULL)$$);
SELECT fails($$SELECT redrive.seal_batch(-1)$$);
SELECT fails($$SELECT redrive.open_batch('unknown')$$);
SELECT fails($$SELECT redrive.open_batch(NULL)$$);
SELECT fails($$SELECT redrive.open_batch('h', run_at => 'infinity')$$);
-- Sealed without an item: finished at once.
SELECT redrive.open_batch('h', label => 'nothing') AS o \gset
SELECT fails(format('SELECT redrive.add_items(%s, ''{}'')', :o));
SELECT fails(format('SELECT redrive.add_items(%s, NULL)', :o));
SELECT fails(format('SELECT redrive.add_items(%s, ARRAY[NULL]::jsonb[])', :o));
SELECT fails(format('SELECT redrive.add_items(%s, ARRAY[''1'']::jsonb[], ''{}'')', :o));
SELECT redrive.seal_batch(:o);
SELECT label, state, total, percent_done FROM redrive.batch_progress WHERE label = 'nothing';
-- Sealed, not started, and cancelled: closed as well.
SELECT redrive.open_batch('h', label => 'cancelled') AS o \gset
SELECT redrive.add_items(:o, ARRAY['1']::jsonb[], ARRAY['cancelled']);
SELECT redrive.cancel_batch(:o);
SELECT fails(format('SELECT redrive.add_items(%s, ARRAY[''1'']::jsonb[])', :o));
SELECT fails(format('SELECT redrive.seal_batch(%s)', :o));
SELECT redrive.is_locked('h', 'cancelled') AS locked;
SELECT * FROM broken;

-- send: at once, after a delay, at a time.
SELECT redrive.send('h', '"now"', 's1') AS s \gset
SELECT b.total, b.keyed, b.run_at <= clock_timestamp() AS due FROM redrive.batches AS b WHERE b.batch_id = :s;
SELECT redrive.send('h', '"delayed"', 's2', '1 hour') AS s \gset
SELECT b.run_at - b.created_at BETWEEN '1 hour' AND '1 hour 1 min' AS after_an_hour FROM redrive.batches AS b WHERE b.batch_id = :s;
SELECT redrive.send('h', '"later"', run_at => '2040-01-01 00:00+00') AS s \gset
SELECT b.run_at = '2040-01-01 00:00+00' AS at_that_time FROM redrive.batches AS b WHERE b.batch_id = :s;
SELECT redrive.send('h', '"past"', delay => '-1 hour') > 0 AS sent;
CALL redrive.work();
SELECT payload FROM done WHERE payload IN ('"now"', '"delayed"', '"later"', '"past"') ORDER BY payload;
SELECT redrive.is_locked('h', 's1') AS s1, redrive.is_locked('h', 's2') AS s2;
UPDATE redrive.batches SET run_at = now(), serve_after = now() WHERE state = 'ready';
CALL redrive.work();
SELECT payload FROM done WHERE payload IN ('"now"', '"delayed"', '"later"', '"past"') ORDER BY payload;
SELECT fails($$SELECT redrive.send('unknown', '1')$$);
SELECT fails($$SELECT redrive.send(NULL, '1')$$);
SELECT fails($$SELECT redrive.send('h', NULL)$$);
SELECT fails($$SELECT redrive.send('h', '1', delay => '1 s', run_at => '2040-01-01')$$);
SELECT fails($$SELECT redrive.send('h', '1', run_at => 'infinity')$$);
SELECT fails($$SELECT redrive.send('h', '1', delay => '300000 years')$$);

-- Priority: the higher first.
DELETE FROM done;
SELECT redrive.submit('h', ARRAY['1']::jsonb[], priority => p, label => 'priority ' || p) > 0 AS submitted FROM unnest(ARRAY[0, -5, 10, 2147483647]) AS p;
ALTER TABLE done ADD place int GENERATED ALWAYS AS IDENTITY;
CALL redrive.work();
SELECT p.label FROM done AS d JOIN redrive.batch_progress AS p ON p.batch_id = d.batch_id ORDER BY d.place;

-- A caller who rolls back leaves nothing.
SELECT count(*) AS batches FROM redrive.batches \gset
BEGIN;
SELECT redrive.submit('h', ARRAY['1']::jsonb[], ARRAY['r1'], label => 'rolled back', idempotency_key => 'rolled back') > 0 AS submitted;
SELECT redrive.submit_query('h', $$SELECT 'r2'::text, '1'::jsonb$$) > 0 AS submitted;
SELECT redrive.open_batch('h') AS o \gset
SELECT redrive.add_items(:o, ARRAY['1']::jsonb[], ARRAY['r3']);
SELECT redrive.seal_batch(:o);
SAVEPOINT s;
SELECT redrive.send('h', '1', 'r4') > 0 AS sent;
SELECT redrive.is_locked('h', 'r4') AS inside;
ROLLBACK TO s;
SELECT redrive.is_locked('h', 'r4') AS after_savepoint, redrive.is_locked('h', 'r1') AS r1;
ROLLBACK;
SELECT count(*) - :batches AS batches FROM redrive.batches;
SELECT k, redrive.is_locked('h', k) AS locked FROM unnest(ARRAY['r1', 'r2', 'r3', 'r4']) AS k ORDER BY k;
SELECT count(*) AS orphans FROM redrive.item_blocks AS i WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = i.batch_id);
DELETE FROM done;
CALL redrive.work();
SELECT * FROM done;
-- The idempotency key is free.
SELECT redrive.submit('h', ARRAY['1']::jsonb[], ARRAY['r1'], label => 'not rolled back', idempotency_key => 'rolled back') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label LIKE '%rolled back';

-- Without rights: of others, and of a role with none at all.  The query of
-- submit_query runs as the caller.
CREATE ROLE regress_submit_a LOGIN;
CREATE ROLE regress_submit_none LOGIN;
SELECT redrive.grant_user('regress_submit_a');
CREATE TABLE secret AS SELECT 'k'::text AS key, '1'::jsonb AS payload;
GRANT INSERT ON done TO regress_submit_a;
SELECT redrive.open_batch('h', label => 'not yours') AS o \gset
SET SESSION AUTHORIZATION regress_submit_a;
SELECT redrive.create_handler('of a', 'take');
SELECT fails($$SELECT redrive.submit('h', ARRAY['1']::jsonb[])$$);
SELECT fails($$SELECT redrive.submit_query('h', 'SELECT NULL::text, ''1''::jsonb')$$);
SELECT fails($$SELECT redrive.open_batch('h')$$);
SELECT fails($$SELECT redrive.send('h', '1')$$);
SELECT fails(format('SELECT redrive.add_items(%s, ARRAY[''1'']::jsonb[])', :o));
SELECT fails(format('SELECT redrive.seal_batch(%s)', :o));
SELECT fails($$SELECT redrive.is_locked('h', 'k')$$);
SELECT fails($$SELECT redrive.submit_query('of a', 'SELECT key, payload FROM scratch.secret')$$);
SELECT fails($$SELECT redrive.submit_query('of a', 'SELECT keys[1], payloads[1] FROM redrive.item_blocks')$$);
SELECT redrive.submit_query('of a', 'SELECT NULL, to_jsonb(current_user::text)', label => 'of a') > 0 AS submitted;
CALL redrive.work();
SELECT payload FROM redrive.items WHERE batch_id = batch('of a');
SET SESSION AUTHORIZATION regress_submit_none;
SELECT fails($$SELECT redrive.submit('h', ARRAY['1']::jsonb[])$$);
SELECT fails($$SELECT redrive.send('h', '1')$$);
RESET SESSION AUTHORIZATION;
SELECT redrive.cancel_batch(:o);
SELECT * FROM broken;
SELECT label, state FROM progress WHERE state NOT IN ('finished', 'cancelled');
SELECT redrive.drop_handler('of a');
DROP OWNED BY regress_submit_a, regress_submit_none;
DROP ROLE regress_submit_a, regress_submit_none;
