-- Classify: which rule decides about which error, and what follows.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE TABLE done (item_no bigint, attempt int);
-- Fails as the payload says: {"sqlstate": ..., "message": ..., "constraint": ..., "until": attempt that works}
CREATE FUNCTION fail_as_told(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF item.payload ? 'sqlstate' AND item.attempt < coalesce((item.payload ->> 'until')::int, 1000) THEN
        RAISE EXCEPTION USING ERRCODE = item.payload ->> 'sqlstate', MESSAGE = coalesce(item.payload ->> 'message', 'told to'),
            CONSTRAINT = coalesce(item.payload ->> 'constraint', '');
    END IF;
    INSERT INTO scratch.done VALUES (item.item_no, item.attempt);
END
$$;
SELECT redrive.create_handler('h', 'fail_as_told');

-- The default rules, and classify() for each.
SELECT sqlstate_pattern, error_class, action, priority, handler, constraint_name, message_pattern, enabled, builtin, hits
FROM redrive.classification_rules ORDER BY rule_id;
CREATE TABLE states (place int GENERATED ALWAYS AS IDENTITY, sqlstate text);
INSERT INTO states (sqlstate) SELECT unnest(ARRAY['RD001', 'RD002', '40001', '40P01', '55P03', '57014', '23503', '0A000', '53000', '53100', '53200', '53300', '57P01', '57P03',
    '58000', '58030', '08000', '08006', '22000', '22012', '22P02', '23000', '23502', '23505', '23514', '23P01', '42000', '42501', '42883', '42P01',
    'P0001', 'P0002', 'XX000', '40002', '55000', '55006', '57000', '01000', '25P02', '2D000', 'RD009', 'ZZZZZ']);
SELECT s.sqlstate, c.error_class, c.action, regexp_replace(c.rule, '^rule \d+(, )?', '') AS rule
FROM states AS s CROSS JOIN LATERAL redrive.classify('h', s.sqlstate) AS c ORDER BY s.place;

-- The engine does what classify() says: one batch each, for those that pause.  Retries come later, however long all this takes.
CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.next_retry_at := NEW.next_retry_at + interval '1 day';
    RETURN NEW;
END
$$;
CREATE TRIGGER later BEFORE UPDATE OF next_retry_at ON redrive.batches FOR EACH ROW EXECUTE FUNCTION later();
-- 57014 raised here would be taken for a Ctrl-C in this session.
SELECT count(redrive.submit('h', ARRAY[jsonb_build_object('sqlstate', sqlstate)], ARRAY[sqlstate], label => sqlstate)) AS submitted
FROM (SELECT sqlstate FROM states WHERE sqlstate <> '57014' ORDER BY place) AS s;
CALL redrive.work();
SELECT b.label, b.state AS batch, f.state, f.reason, f.error_class, f.retry_count AS retries, f.attempts, f.next_attempt_at IS NOT NULL AS next, redrive.is_locked('h', f.key) AS locked
FROM states AS s
JOIN redrive.batch_progress AS b ON b.label = s.sqlstate
JOIN redrive.failed_items AS f ON f.batch_id = b.batch_id ORDER BY s.place;
SELECT count(*) AS differ
FROM redrive.failed_items AS f CROSS JOIN LATERAL redrive.classify('h', f.sqlstate, f.message) AS c WHERE f.error_class <> c.error_class;
SELECT * FROM broken;
-- Each error is a hit of its rule; an attempt that is repeated at once is one too.
SELECT coalesce(sqlstate_pattern, 'any') AS pattern, hits FROM redrive.classification_rules ORDER BY rule_id;
SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE state NOT IN ('finished', 'cancelled') ORDER BY batch_id \g /dev/null
CALL redrive.work();
SELECT * FROM broken;

-- raise_validation and raise_user_error.
CREATE FUNCTION reject(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    CASE payload ->> 0
        WHEN 'validation' THEN PERFORM redrive.raise_validation('not valid', 'because of this');
        WHEN 'user_error' THEN PERFORM redrive.raise_user_error('wrong', 'because of that');
        WHEN 'bare validation' THEN PERFORM redrive.raise_validation('only a message with 100 % of % signs');
        WHEN 'nothing' THEN PERFORM redrive.raise_validation(NULL, NULL);
        WHEN 'caught' THEN
            BEGIN
                PERFORM redrive.raise_validation('not valid');
            EXCEPTION WHEN SQLSTATE 'RD001' THEN
                NULL;
            END;
    END CASE;
END
$$;
SELECT redrive.create_handler('rejects', 'reject');
SELECT redrive.submit('rejects', ARRAY['["validation"]', '["user_error"]', '["bare validation"]', '["nothing"]', '["caught"]']::jsonb[], ARRAY['a', 'b', 'c', 'd', 'e'], label => 'rejects') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, key, state, error_class, sqlstate, message, detail, retry_count, redrive.is_locked('rejects', key) AS locked
FROM redrive.failed_items WHERE batch_id = batch('rejects') ORDER BY item_no;
SELECT * FROM progress WHERE label = 'rejects';
SELECT * FROM broken;
SELECT redrive.cancel_batch(batch('rejects'));
SELECT fails($$SELECT redrive.raise_validation('the message', 'the detail')$$);
SELECT fails($$SELECT redrive.raise_validation('the message')$$);
SELECT fails($$SELECT redrive.raise_validation(NULL)$$);
SELECT fails($$SELECT redrive.raise_user_error('the message', 'the detail')$$);
SELECT fails($$SELECT redrive.raise_user_error('the message')$$);
SELECT fails($$SELECT redrive.raise_user_error(NULL)$$);

-- An item that runs too long: the time-out is an error of class timeout.
CREATE FUNCTION loop_for_ever(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    WHILE payload = '"slow"' LOOP
        PERFORM 1;
    END LOOP;
END
$$;
SELECT redrive.create_handler('slow', 'loop_for_ever', item_timeout => '100 ms');
SELECT redrive.submit('slow', ARRAY['"quick"', '"slow"', '"quick"']::jsonb[], label => 'slow') > 0 AS submitted;
CALL redrive.work();
SELECT item_no, state, error_class, sqlstate, message, detail, retry_count FROM redrive.failed_items WHERE batch_id = batch('slow');
SELECT * FROM progress WHERE label = 'slow';
SELECT * FROM broken;
SELECT redrive.cancel_batch(batch('slow'));

-- Rules of one's own: by message, constraint, handler and priority.
SELECT redrive.create_handler('other', 'fail_as_told');
SELECT redrive.create_handler('third', 'fail_as_told');
INSERT INTO redrive.classification_rules (handler, priority, sqlstate_pattern, constraint_name, message_pattern, error_class, action) VALUES
    (NULL, 0, '23505', NULL, NULL, 'duplicate', 'ignore'),
    (NULL, 0, '23505', 'must_retry', NULL, 'constraint', 'retry'),
    (NULL, 0, '23505', NULL, '(?i)deadline', 'message', 'fail'),
    (NULL, 0, NULL, 'any_state', NULL, 'any_state', 'fail'),
    ('other', 0, '23505', NULL, NULL, 'of_other', 'retry_free'),
    ('other', -1, 'P%', NULL, NULL, 'below', 'ignore'),
    ('third', 0, NULL, NULL, NULL, 'all_of_third', 'ignore'),
    (NULL, 10, NULL, NULL, '^urgent', 'urgent', 'fail'),
    (NULL, 20, NULL, NULL, '^urgent but off', 'off', 'ignore');
UPDATE redrive.classification_rules SET enabled = false WHERE error_class = 'off';
CREATE TABLE errors (place int GENERATED ALWAYS AS IDENTITY, handler text, sqlstate text, message text, constraint_name text);
INSERT INTO errors (handler, sqlstate, message, constraint_name)
SELECT h, e.* FROM unnest(ARRAY['h', 'other', 'third']) AS h CROSS JOIN (VALUES
    ('23505', 'duplicate', NULL), ('23505', 'duplicate', 'must_retry'), ('23505', 'past the DEADLINE', NULL), ('23505', 'past the deadline', 'must_retry'),
    ('P0001', 'something', NULL), ('P0001', 'something', 'any_state'), ('23505', 'something', 'any_state'), ('42P01', 'urgent', NULL), ('22012', 'urgent but off', NULL), ('P0001', 'not urgent', NULL)) AS e;
SELECT e.handler, e.sqlstate, e.message, e.constraint_name, c.error_class, c.action, regexp_replace(c.rule, '^rule \d+(, )?', '') AS rule
FROM errors AS e CROSS JOIN LATERAL redrive.classify(e.handler, e.sqlstate, e.message, e.constraint_name) AS c ORDER BY e.place;
-- The same when they happen, all in one batch for each handler.
SELECT count(redrive.submit(handler, p, label => 'own ' || handler)) AS submitted
FROM (SELECT handler, array_agg(jsonb_strip_nulls(jsonb_build_object('sqlstate', sqlstate, 'message', message, 'constraint', constraint_name)) ORDER BY place) AS p FROM errors GROUP BY handler ORDER BY handler) AS x;
CALL redrive.work();
SELECT e.handler, count(*), count(*) FILTER (WHERE f.error_class IS DISTINCT FROM c.error_class) AS wrong_class,
    count(*) FILTER (WHERE f.state::text <> CASE c.action WHEN 'ignore' THEN 'ignored' WHEN 'fail' THEN 'failed' ELSE 'waiting' END) AS wrong_state
FROM (SELECT *, row_number() OVER (PARTITION BY handler ORDER BY place) AS item_no FROM errors) AS e
CROSS JOIN LATERAL redrive.classify(e.handler, e.sqlstate, e.message, e.constraint_name) AS c
LEFT JOIN redrive.failed_items AS f ON f.handler = e.handler AND f.batch_id = batch('own ' || e.handler) AND f.item_no = e.item_no
GROUP BY e.handler ORDER BY e.handler;
SELECT error_class, hits FROM redrive.classification_rules WHERE NOT builtin ORDER BY rule_id;
SELECT * FROM broken;
DROP TRIGGER later ON redrive.batches;
SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE state NOT IN ('finished', 'cancelled') ORDER BY batch_id \g /dev/null
DELETE FROM redrive.classification_rules WHERE NOT builtin;

-- classify() with less: no message, no constraint, an unknown handler, NULLs.
SELECT error_class, action FROM redrive.classify('unknown', '23505');
SELECT error_class, action FROM redrive.classify(NULL, '23505', NULL, NULL);
SELECT error_class, action FROM redrive.classify('h', NULL);
SELECT error_class, action FROM redrive.classify('h', '');

-- What a rule may not be.
SELECT fails($$INSERT INTO redrive.classification_rules (sqlstate_pattern, error_class, action) VALUES ('%', 'a', 'fail')$$) LIMIT 1;
SELECT fails($$INSERT INTO redrive.classification_rules (sqlstate_pattern, error_class, action) VALUES ('p0001', 'a', 'fail')$$) LIMIT 1;
SELECT fails($$INSERT INTO redrive.classification_rules (message_pattern, error_class, action) VALUES ('(', 'a', 'fail')$$) LIMIT 1;
SELECT fails($$INSERT INTO redrive.classification_rules (sqlstate_pattern, error_class, action) VALUES ('P0001', 'Not a Word', 'fail')$$) LIMIT 1;
SELECT fails($$INSERT INTO redrive.classification_rules (sqlstate_pattern, error_class, action) VALUES ('P0001', 'a', 'explode')$$) LIMIT 1;
SELECT fails($$INSERT INTO redrive.classification_rules (handler, error_class, action) VALUES ('unknown', 'a', 'fail')$$) LIMIT 1;
SELECT fails($$INSERT INTO redrive.classification_rules (sqlstate_pattern, error_class, action) VALUES ('22%', 'again', 'fail')$$) LIMIT 1;
DELETE FROM redrive.classification_rules WHERE NOT builtin;

-- ignore, fail: final at once.  retry: costs.  retry_free: does not.
INSERT INTO redrive.classification_rules (handler, sqlstate_pattern, error_class, action) VALUES
    ('h', 'U0001', 'ignored', 'ignore'), ('h', 'U0002', 'failed', 'fail'), ('h', 'U0003', 'retried', 'retry'), ('h', 'U0004', 'free', 'retry_free'), ('h', 'U0005', 'paused', 'pause');
SELECT redrive.submit('h', array_agg(jsonb_build_object('sqlstate', 'U000' || i, 'until', 3) ORDER BY i), array_agg('u' || i ORDER BY i), label => 'actions') > 0 AS submitted FROM generate_series(1, 4) AS i;
CALL redrive.work();
SELECT item_no, state, reason, retry_count, attempts, redrive.is_locked('h', key) AS locked FROM redrive.failed_items WHERE batch_id = batch('actions') ORDER BY item_no;
CALL make_due();
CALL redrive.work();
SELECT item_no, state, reason, retry_count, attempts, redrive.is_locked('h', key) AS locked FROM redrive.failed_items WHERE batch_id = batch('actions') ORDER BY item_no;
CALL make_due();
CALL redrive.work();
SELECT * FROM progress WHERE label = 'actions';
SELECT item_no, state, reason, retry_count, free_count, attempts FROM redrive.failures WHERE batch_id = batch('actions') ORDER BY item_no;
SELECT * FROM broken;

-- pause: the batch stops at the item, says why, costs nothing, and goes on.
DELETE FROM done;
SELECT redrive.submit('h', ARRAY['{}', '{"sqlstate": "U0005", "message": "a bug was deployed", "until": 2}', '{}', '{}']::jsonb[], ARRAY['p1', 'p2', 'p3', 'p4'], label => 'pauses') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'pauses';
SELECT pause_reason FROM redrive.batch_progress WHERE label = 'pauses';
SELECT item_no, state, error_class, retry_count, attempts, redrive.is_locked('h', key) AS locked FROM redrive.failed_items WHERE batch_id = batch('pauses') ORDER BY item_no;
SELECT * FROM done ORDER BY item_no;
SELECT * FROM broken;
CALL redrive.work();
SELECT * FROM progress WHERE label = 'pauses';
SELECT redrive.resume_batch(batch('pauses'));
CALL redrive.work();
SELECT * FROM progress WHERE label = 'pauses';
SELECT pause_reason FROM redrive.batch_progress WHERE label = 'pauses';
SELECT * FROM done ORDER BY item_no;
SELECT item_no, state, retry_count, attempts FROM redrive.failures WHERE batch_id = batch('pauses') ORDER BY item_no;
SELECT * FROM broken;
-- Not mended: resume pauses it again, and costs no retry.
SELECT redrive.submit('h', ARRAY['{"sqlstate": "U0005"}', '{}']::jsonb[], label => 'pauses again') > 0 AS submitted;
CALL redrive.work();
SELECT redrive.resume_batch(batch('pauses again'));
CALL redrive.work();
SELECT redrive.resume_batch(batch('pauses again'));
CALL redrive.work();
SELECT label, state, succeeded, waiting, pending FROM progress WHERE label = 'pauses again';
SELECT item_no, state, retry_count, attempts FROM redrive.failed_items WHERE batch_id = batch('pauses again');
SELECT * FROM broken;
SELECT redrive.cancel_batch(batch('pauses again'));

-- tolerated_failures: beyond it the batch pauses.
SELECT redrive.create_handler('tolerant', 'fail_as_told', tolerated_failures => 5);
SELECT redrive.submit('tolerant', array_agg(jsonb_build_object('sqlstate', '22000')), label => 'not tolerated') > 0 AS submitted FROM generate_series(1, 500) AS i;
SELECT redrive.submit('tolerant', array_agg(CASE WHEN i % 100 = 0 THEN '{"sqlstate": "22000"}' ELSE '{}' END::jsonb), label => 'tolerated') > 0 AS submitted FROM generate_series(1, 500) AS i;
CALL redrive.work();
SELECT label, state, failed > 5 AS beyond, pending > 0 AS pending, regexp_replace(pause_reason, '^\d+', 'N') AS pause_reason FROM redrive.batch_progress WHERE label LIKE '%tolerated' ORDER BY batch_id;
SELECT * FROM broken;
SELECT redrive.cancel_batch(batch('not tolerated'));

-- Without the rule that fits all, an error is retried.
UPDATE redrive.classification_rules SET enabled = false WHERE builtin AND sqlstate_pattern IS NULL;
SELECT * FROM redrive.classify('other', 'P0001');
SELECT redrive.submit('other', ARRAY['{"sqlstate": "P0001"}']::jsonb[], label => 'no rule') > 0 AS submitted;
CALL redrive.work();
SELECT state, error_class, retry_count FROM redrive.failed_items WHERE batch_id = batch('no rule');
UPDATE redrive.classification_rules SET enabled = true WHERE builtin;
SELECT redrive.cancel_batch(batch('no rule'));
SELECT * FROM broken;
DELETE FROM redrive.classification_rules WHERE NOT builtin;
