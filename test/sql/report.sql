-- The report: its numbers are those of the views, what users wrote is escaped,
-- and it shows a role what the views show it.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools
-- numbers that would get commas if they were counts
SELECT setval(pg_get_serial_sequence('redrive.batches', 'batch_id'), 12345, false);

CREATE ROLE regress_report_owner LOGIN;
CREATE ROLE regress_report_other;
CREATE ROLE regress_report_monitor;
SELECT redrive.grant_user('regress_report_owner'), redrive.grant_user('regress_report_other'), redrive.grant_monitor('regress_report_monitor');

-- The body is well-formed, so that it can be asked with paths.  With one value
-- that is not escaped it would not be.
CREATE FUNCTION body(since interval DEFAULT '24 h') RETURNS xml LANGUAGE sql AS $$
    SELECT substring(redrive.report_html(since) FROM '<body>.*</body>')::xml
$$;
-- The cells of a table of the report, a row as one text.
CREATE FUNCTION cells(report xml, section text) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT array_to_string(ARRAY(SELECT (xpath('string(.)', x))[1]::text FROM unnest(xpath('/tr/td', r)) AS x), '|')
    FROM unnest(xpath(format('//section[@id="%s"]//tbody/tr', section), report)) AS r
$$;

-- Nothing there yet.
SELECT (xpath('//section/@id', body()))::text AS sections;
SELECT xpath('//section//p[@class="empty"]/text()', body())::text AS empty;
SELECT xpath('//ul/li/b/text()', body())::text AS tiles;

SET SESSION AUTHORIZATION regress_report_owner;
CREATE FUNCTION hostile(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF payload ->> 0 <> 'good' THEN
        RAISE EXCEPTION '%', payload ->> 0 USING ERRCODE = CASE WHEN payload ->> 1 = 'fail' THEN '22000' ELSE 'P0001' END;
    END IF;
END
$$;
SELECT redrive.create_handler('<b>"handler" & co</b>', 'hostile');
SELECT redrive.submit('<b>"handler" & co</b>', ARRAY['["good"]', '["good"]', '["<script>alert(1)</script>", "fail"]', '["]]> <img src=x onerror=''alert(2)''>", "wait"]', '["\" onload=\"x", "wait"]']::jsonb[],
    label => '</table><script>alert(3)</script>') IS NULL AS n;
CALL redrive.work();
SELECT redrive.submit('<b>"handler" & co</b>', ARRAY['["good"]']::jsonb[], label => 'not yet', run_at => now() + interval '1 day') IS NULL AS n;

-- Each number as the view has it.
SELECT xpath('//ul/li/b/text()', body())::text AS tiles;
SELECT (xpath('//li[@id="tile-done"]/b/text()', b))[1]::text::numeric = (SELECT sum(items) FROM redrive.throughput) AS done,
    (xpath('//li[@id="tile-failed"]/b/text()', b))[1]::text::numeric = (SELECT sum(failed) FROM redrive.throughput) AS failed,
    (xpath('//li[@id="tile-waiting"]/b/text()', b))[1]::text::numeric = (SELECT sum(waiting) FROM redrive.batch_progress) AS waiting,
    (xpath('//li[@id="tile-live"]/b/text()', b))[1]::text::numeric = (SELECT count(*) FROM redrive.batch_progress WHERE finished_at IS NULL) AS live
FROM body() AS b;
-- The table of a chart has the numbers, a rectangle for each, and the heights are in proportion.
SELECT (SELECT string_agg(c::text, ', ') FROM unnest(xpath('//section[@id="throughput"]//tbody//td[@class="n"]/text()', b)) AS x (c)) AS numbers,
    (SELECT count(*) FROM unnest(xpath('//section[@id="throughput"]//*[local-name()="rect"]', b))) AS rectangles,
    (SELECT string_agg(regexp_replace(c, '^.*: ', ''), ', ') FROM unnest(xpath('//section[@id="throughput"]//*[local-name()="rect"]/*/text()', b)::text[]) AS x (c)) AS titles
FROM (SELECT replace(body()::text, ' xmlns="http://www.w3.org/2000/svg"', '')::xml) AS x (b);
SELECT string_agg(round(h / 0.5 / first_value)::text, ', ') AS proportions
FROM (SELECT h::text::numeric, first_value(h::text::numeric) OVER () FROM unnest(xpath('//section[@id="throughput"]//*[local-name()="rect"]/@height', body())) AS x (h)) AS y;
SELECT xpath('//section[@id="throughput"]//*[local-name()="text"][@text-anchor="end"]/text()', body())::text AS scale;
SELECT xpath('//section[@id="failures"]//tbody//td[@class="n"]/text()', body())::text = (SELECT ARRAY[sum(ignored), sum(failed), sum(to_retry)]::text FROM redrive.throughput) AS failures;

-- Claims of workers outside.
SELECT redrive.create_handler('<i>outside</i>', kind => 'external');
SELECT redrive.submit('<i>outside</i>', ARRAY['1']::jsonb[]) IS NULL AS n;
SELECT chunk_id, lease_token FROM redrive.claim('<i>outside</i>', 1, '5 min', worker => '<i>one</i>') \gset
SELECT regexp_replace(c, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d', 'TIME') AS workers FROM cells(body(), 'workers') AS c;
SELECT redrive.complete(:chunk_id, :lease_token);

-- Escaped: no element that we do not make, and the text is there.
SELECT xpath('count(//script | //img | //b[not(parent::li)])', body())::text AS elements_of_users;
SELECT regexp_replace(c, '\|[\d,.]+\|[^|]*$', '|RATE|TIME') FROM cells(body(), 'batches') AS c;
SELECT regexp_replace(c, '\d{4}-\d\d-\d\d \d\d:\d\d\|\w+$', 'TIME|FINGERPRINT') FROM cells(body(), 'groups') AS c ORDER BY 1;
SELECT regexp_replace(c, '\d{4}-\d\d-\d\d.*', 'TIME') FROM cells(body(), 'retries') AS c;
SELECT redrive.report_html() ~ '<script|<img|<b>"|</table><script' AS raw;
RESET SESSION AUTHORIZATION;

-- A column is one of numbers if any of its rows has one.
SELECT redrive._report_table('x', '<X>', '', $$SELECT NULL::int AS n, 'a' AS t UNION ALL SELECT 1234, 'b' ORDER BY t$$, '');
-- Characters that XML does not have are in messages, too.
SELECT redrive._report_table('x', 'X', '', $$SELECT E'\x01\x1b[31m<' AS c$$, '')::text ~ E'<td>\x01\x1b\\[31m&lt;</td>' AS kept;
-- The tables of what goes wrong.
BEGIN;
UPDATE redrive.batches SET last_progress_at = x.t, run_at = x.t, serve_after = x.t, created_at = x.t, sealed_at = x.t FROM (SELECT now() - interval '2 days' AS t) AS x WHERE label = 'not yet';
INSERT INTO redrive.pass_log (pass, as_of, started_at, finished_at, acted, more, detail)
SELECT 'purge', t, t, t + interval '1.5 s', 1234, false, '<i>"detail"</i> & co' FROM (VALUES (timestamptz '2000-01-01 00:00'), ('2000-01-02 00:00')) AS x (t);
SELECT regexp_replace(c, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d', 'TIME') AS stale FROM cells(body(), 'stale') AS c;
SELECT c AS passes FROM cells(body(), 'passes') AS c;
SELECT regexp_replace(c, '[^|]+$', 'AGE') AS handlers FROM cells(body(), 'queues') AS c;
ROLLBACK;

-- Somebody else sees nothing of it, a monitor no messages; findings only who may ask the doctor.
SET SESSION AUTHORIZATION regress_report_other;
SELECT xpath('//ul/li/b/text()', body())::text AS tiles, redrive.report_html() LIKE '%handler%amp;%' AS named, redrive.report_html() LIKE '%alert%' AS told;
SELECT (xpath('//section/@id', body()))::text AS sections;
RESET SESSION AUTHORIZATION;
SET SESSION AUTHORIZATION regress_report_monitor;
SELECT (xpath('//li[@id="tile-done"]/b/text()', body()))::text AS done, redrive.report_html() LIKE '%alert(1)%' AS told, cells(body(), 'groups') LIKE '%|–|%' AS hidden LIMIT 1;
RESET SESSION AUTHORIZATION;

-- Users may call the doctor, who tells monitors only.
SET SESSION AUTHORIZATION regress_report_other;
SELECT xpath('//section[@id="doctor"]', body())::text AS findings;
SET SESSION AUTHORIZATION regress_report_monitor;
SELECT count(*) FROM (SELECT c FROM cells(body(), 'doctor') AS c EXCEPT SELECT concat_ws('|', severity, finding, remedy) FROM redrive.doctor()) AS x;
SELECT count(*) > 0 AS findings FROM cells(body(), 'doctor');
RESET SESSION AUTHORIZATION;

-- Names of roles and codes of outcomes are words of users, too; those of classes have no such characters.
SELECT f FROM fails($$INSERT INTO redrive.classification_rules (error_class, action) VALUES ('<i>class</i>', 'fail')$$) AS f LIMIT 1;
CREATE ROLE "regress_report</p><script>alert(4)</script> & 'co'" LOGIN;
SELECT redrive.grant_user('regress_report</p><script>alert(4)</script> & ''co''');
SET SESSION AUTHORIZATION "regress_report</p><script>alert(4)</script> & 'co'";
SELECT redrive.create_handler('codes', kind => 'external');
SELECT redrive.submit('codes', ARRAY['1', '2', '3']::jsonb[], label => 'codes') IS NULL AS n;
SELECT chunk_id, lease_token FROM redrive.claim('codes', 2, '5 min') ORDER BY item_no LIMIT 1 \gset
SELECT redrive.complete(:chunk_id, :lease_token, ARRAY[(1, 'failed', 'not so', '<u>code</u> & "co"', NULL), (2, 'failed', 'nor so', '</td>', NULL)]::redrive.outcome[]);
SELECT chunk_id, lease_token FROM redrive.claim('codes', 1, '5 min') \gset
SELECT regexp_replace(c, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d', 'TIME') AS workers FROM cells(body(), 'workers') AS c;
SELECT regexp_replace(c, '\d{4}-\d\d-\d\d \d\d:\d\d\|\w+$', 'TIME|FINGERPRINT') AS groups FROM cells(body(), 'groups') AS c ORDER BY 1;
SELECT regexp_replace((xpath('string(//header/p)', b))[1]::text, '^.*\), as (.*) sees it.*$', '\1') AS who,
    xpath('count(//script | //i | //u | //p/p | //b[not(parent::li)])', b)::text AS elements_of_users
FROM body() AS b;
SELECT redrive.report_html() ~ '<script|<i>|<u>|<td></td>|& ' AS raw;
SELECT redrive.complete(:chunk_id, :lease_token);
RESET SESSION AUTHORIZATION;
SELECT batch_id AS b FROM redrive.batch_progress WHERE label = 'codes' \gset
CALL redrive.wait(:b, '30 s');
SELECT redrive.drop_handler('codes');
SELECT redrive.revoke_user('regress_report</p><script>alert(4)</script> & ''co''');
DROP ROLE "regress_report</p><script>alert(4)</script> & 'co'";

-- Platforms: the numbers of platform_health and push_attempts.
SET SESSION AUTHORIZATION regress_report_owner;
BEGIN;
SELECT redrive.create_platform('<i>crm</i>', 'https://crm.example/?secret', headers => '{"x-key": "secret"}');
SELECT redrive.pause_platform('<i>crm</i>');
COMMIT;
SELECT redrive.set_platform_secret('<i>crm</i>', 'bearer', 'secret');
SELECT count(redrive.record_task('secret ' || n, '<b>done</b>', '"secret"')) FROM generate_series(1, 7) AS n;
RESET SESSION AUTHORIZATION;
UPDATE redrive.pushes SET state = 'dead', message = 'secret' WHERE push_id = (SELECT min(push_id) FROM redrive.pushes);
UPDATE redrive.platform_states SET breaker = 'half_open', reason = '<u>not</u> well', attempts = 6, delivered = 3, blocked_until = '2000-01-01';
INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe, message, response)
SELECT 0, p.push_id, n, p.platform_id, 1, now(), now(), n <= 3, n <= 5, false, 'secret', 'secret'
FROM (SELECT * FROM redrive.pushes ORDER BY push_id LIMIT 1) AS p CROSS JOIN generate_series(1, 6) AS n;
SET SESSION AUTHORIZATION regress_report_monitor;
SELECT regexp_replace(c, '\|@ [^|]*\|', '|AGE|') AS c FROM cells(body(), 'platforms') AS c;
SELECT xpath('//section[@id="pushes"]//tbody//td[@class="n"]/text()', body())::text = (
        SELECT array[count(*) FILTER (WHERE delivered), count(*) FILTER (WHERE NOT delivered AND charged), count(*) FILTER (WHERE NOT delivered AND NOT charged)]::text
        FROM redrive.push_attempts) AS as_the_view,
    xpath('//section[@id="pushes"]//tbody//td[@class="n"]/text()', body())::text AS numbers,
    (xpath('//li[@id="tile-due"]/b/text()', body()))[1]::text::numeric = (SELECT sum(due) FROM redrive.platform_health) AS due,
    redrive.report_html() ~ 'secret|<i>|<u>' AS told;
SET SESSION AUTHORIZATION regress_report_other;
SELECT xpath('//section[@id="platforms"]//p/text()', body())::text AS platforms, xpath('//section[@id="pushes"]', body())::text AS pushes, redrive.report_html() LIKE '%crm%' AS told;
RESET SESSION AUTHORIZATION;
SELECT redrive.drop_platform('<i>crm</i>');

-- Other times: the parts of a chart, at most 49.
SELECT s AS since, xpath('//section[@id="throughput"]//*[local-name()="text"][@text-anchor="start"]/text()', body(s))::text AS unit
FROM unnest(ARRAY['1 min', '1 hour', '24 hours', '10 days', '1 year', '20 years']::interval[]) AS s;
SELECT fails($$SELECT redrive.report_html(NULL)$$);
SELECT fails($$SELECT redrive.report_html('1 s')$$);
SELECT fails($$SELECT redrive.report_html('-1 day')$$);

-- A chart has everything of its time, days of 23 and 25 hours or not.
SET timezone = 'Europe/Berlin';
INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, done, succeeded, folded, claimed_at, progress_at, finished_at)
SELECT 0, (SELECT min(handler_id) FROM redrive.handlers), 0, 1, 'first', 'done', 1, 1, 1, 1, 1, 1, true, t, t, t
FROM (SELECT now() - n * interval '24 h' AS t FROM generate_series(1, 700) AS n) AS x;
SELECT s AS since, (SELECT sum(n::text::numeric) FROM unnest(xpath('//section[@id="throughput"]//tbody//td[@class="n"][1]/text()', body(s))) AS x (n))
        - (SELECT sum(succeeded) FROM redrive._ended WHERE finished_at >= (SELECT first FROM redrive._report_parts(s))) AS lacks
FROM unnest(ARRAY['8 days', '40 days', '300 days', '600 days', '2 years']::interval[]) AS s;
-- Each part has what ended in it, and its time below it.
SELECT count(*) > 30 AS parts, count(*) FILTER (WHERE c IS DISTINCT FROM to_char(e.at, 'YYYY-MM-DD HH24:MI') || '|' || e.n || '|0|0|0') AS wrong
FROM (SELECT c, row_number() OVER () AS place FROM cells(body('40 days'), 'throughput') AS c) AS r
FULL JOIN (
    SELECT t.at, count(*) AS n, row_number() OVER (ORDER BY t.at) AS place
    FROM (SELECT generate_series(first, now(), part) AS at, part FROM redrive._report_parts('40 days')) AS t
    JOIN redrive.chunks AS c ON c.finished_at >= t.at AND c.finished_at < t.at + t.part AND c.batch_id = 0
    GROUP BY t.at) AS e USING (place)
WHERE e.at < date_trunc('day', now());
SELECT s AS since, regexp_replace((xpath('//section[@id="throughput"]//*[local-name()="text"][@text-anchor="middle"]/text()', body(s)))[1]::text, '\d', 'N', 'g') AS label
FROM unnest(ARRAY['1 day', '2 days', '300 days', '2 years']::interval[]) AS s;
DELETE FROM redrive.chunks WHERE batch_id = 0;
RESET timezone;

-- With JIT a page of many rows takes five times as long.
SELECT proconfig FROM pg_proc WHERE proname = 'report_html';

-- One page: nothing comes from elsewhere.
SELECT redrive.report_html() ~ '(src|href)=|@import|url\(' AS loads, redrive.report_html() ~ '^<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">' AS starts, redrive.report_html() ~ '</body></html>$' AS ends;

SELECT redrive.cancel_batch(scratch.batch('not yet'));
SELECT redrive.cancel_batch(scratch.batch('</table><script>alert(3)</script>'));
SELECT redrive._fold_ended() IS NULL AS folded;
SELECT redrive.drop_handler(name) FROM redrive.handlers;
DROP FUNCTION hostile(jsonb);
SELECT redrive.revoke_user('regress_report_owner'), redrive.revoke_user('regress_report_other'), redrive.revoke_user('regress_report_monitor');
DROP ROLE regress_report_owner, regress_report_other, regress_report_monitor;

-- Databases of other encodings: the script is ASCII, and so is what the page has besides the words of users.
SELECT current_database() AS home \gset
CREATE DATABASE regress_report_cn ENCODING 'EUC_CN' TEMPLATE template0;
\c regress_report_cn
SET client_min_messages = warning;
CREATE EXTENSION pg_redrive;
SELECT redrive.report_html() ~ '[^[:ascii:]]' AS other;
CREATE DATABASE "regress_report <b>&" ENCODING 'LATIN1' TEMPLATE template0;
\c "regress_report <b>&"
SET client_encoding = 'UTF8';
SET client_min_messages = warning;
CREATE EXTENSION pg_redrive;
CREATE FUNCTION nothing(payload jsonb) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('Prüfung <é>', 'nothing');
SELECT (regexp_matches(redrive.report_html(), '<td>(Pr[^/]*)</td>'))[1] AS handler,
    (regexp_matches(redrive.report_html(), '<h1>.*</h1>'))[1] AS title, redrive.report_html() ~ '[^[:ascii:]üé]' AS other;
\c :home
DROP DATABASE regress_report_cn;
DROP DATABASE "regress_report <b>&";
