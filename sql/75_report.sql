-- Report: one HTML page about everything, made of the views and therefore
-- showing each role what the views show it.
--
-- Elements are made by the server's XML functions, which escape whatever users
-- wrote; plain text are only the head and the style sheet below.

-- A part of the page that is a list of rows.  p_query names its columns as they
-- shall read; a column "progress" holds a percentage and becomes a bar, NULL a dash.
CREATE FUNCTION redrive._report_table(p_id text, p_title text, p_note text, p_query text, p_empty text) RETURNS xml
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_rows json;
    v_numbers text[];
BEGIN
    EXECUTE format('SELECT json_agg(q) FROM (%s) AS q', p_query) INTO v_rows;
    IF v_rows IS NULL THEN
        RETURN redrive._report_section(p_id, p_title, p_note, xmlelement(NAME p, xmlattributes('empty' AS class), p_empty));
    END IF;
    v_numbers := ARRAY(SELECT DISTINCT c.key FROM json_array_elements(v_rows) AS r CROSS JOIN json_each(r) AS c WHERE json_typeof(c.value) = 'number' AND c.key <> 'progress');
    RETURN redrive._report_section(p_id, p_title, p_note,
        xmlelement(NAME div, xmlattributes('scroll' AS class, '0' AS tabindex, 'region' AS role, 'Table: ' || p_title AS "aria-label"),
            xmlelement(NAME table,
                xmlelement(NAME thead, xmlelement(NAME tr, (
                    SELECT xmlagg(xmlelement(NAME th, xmlattributes('col' AS scope, CASE WHEN h.key = ANY (v_numbers) THEN 'n' END AS class), h.key) ORDER BY h.place)
                    FROM json_each(v_rows -> 0) WITH ORDINALITY AS h (key, value, place)))),
                xmlelement(NAME tbody, (
                    SELECT xmlagg(xmlelement(NAME tr, (
                            SELECT xmlagg(CASE
                                    WHEN json_typeof(c.value) = 'null' OR c.value #>> '{}' = '' THEN
                                        xmlelement(NAME td, xmlattributes(CASE WHEN c.key = ANY (v_numbers) THEN 'n' END AS class), xmlparse(CONTENT '&#8211;'))
                                    WHEN c.key = 'progress' THEN xmlelement(NAME td,
                                        xmlelement(NAME progress, xmlattributes(100 AS max, c.value #>> '{}' AS value, 'progress' AS "aria-label"), c.value #>> '{}'),
                                        ' ' || (c.value #>> '{}') || ' %')
                                    WHEN json_typeof(c.value) = 'number' THEN xmlelement(NAME td, xmlattributes('n' AS class), redrive._report_number((c.value #>> '{}')::numeric))
                                    ELSE xmlelement(NAME td, xmlattributes(CASE WHEN length(c.value #>> '{}') > 30 THEN 'long' END AS class), c.value #>> '{}')
                                END ORDER BY c.place)
                            FROM json_each(r.value) WITH ORDINALITY AS c (key, value, place))) ORDER BY r.place)
                    FROM json_array_elements(v_rows) WITH ORDINALITY AS r (value, place))))));
END
$$;

CREATE FUNCTION redrive._report_number(p_value numeric) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN $1 = trunc($1) THEN to_char($1, 'FM999,999,999,999,999,990') ELSE trim_scale(round($1, 3))::text END
$$;

-- Stacked columns over time, and the same numbers as a table.  p_values has a
-- row per series and a column per time, p_colours a number per series.
CREATE FUNCTION redrive._report_chart(p_title text, p_unit text, p_times timestamptz[], p_names text[], p_colours int[], p_values numeric[]) RETURNS xml
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    c_left constant numeric := 64;
    c_top constant numeric := 12;
    c_width constant numeric := 720;
    c_height constant numeric := 180;
    v_n int := cardinality(p_times);
    v_column numeric := c_width / v_n;
    v_most numeric;
    v_step numeric;
    v_scale numeric;
    v_format text := CASE WHEN p_times[v_n] - p_times[1] > interval '300 days' THEN 'YYYY-MM-DD' WHEN p_times[v_n] - p_times[1] > interval '36 hours' THEN 'MM-DD HH24:MI' ELSE 'HH24:MI' END;
BEGIN
    SELECT max(s.sum) INTO v_most
    FROM (SELECT sum(p_values[i][j]) FROM generate_series(1, cardinality(p_names)) AS i CROSS JOIN generate_series(1, v_n) AS j GROUP BY j) AS s;
    -- about four lines at round numbers
    v_step := greatest(v_most, 1) / 4;
    SELECT min(s.step) INTO v_step
    FROM (SELECT m * 10 ^ (floor(log(v_step)) + e) AS step FROM unnest(ARRAY[1, 2, 5]) AS m CROSS JOIN generate_series(0, 1) AS e) AS s
    WHERE s.step >= v_step AND s.step >= 1;
    v_scale := c_height / (v_step * greatest(ceil(v_most / v_step), 1));
    RETURN xmlelement(NAME figure,
        xmlelement(NAME div, xmlattributes('scroll' AS class, '0' AS tabindex, 'region' AS role, 'Chart: ' || p_title AS "aria-label"), xmlelement(NAME svg, xmlattributes('http://www.w3.org/2000/svg' AS xmlns, '0 0 800 232' AS "viewBox", 'img' AS role, p_title || ', ' || p_unit AS "aria-label"),
            (SELECT xmlagg(xmlconcat(
                    xmlelement(NAME line, xmlattributes('grid' AS class, c_left AS x1, c_left + c_width AS x2, y.at AS y1, y.at AS y2)),
                    xmlelement(NAME text, xmlattributes('end' AS "text-anchor", c_left - 6 AS x, y.at + 4 AS y), redrive._report_number(y.value))) ORDER BY y.value)
                FROM (SELECT g AS value, round(c_top + c_height - g * v_scale, 1) AS at
                    FROM generate_series(0, v_step * greatest(ceil(v_most / v_step), 1), v_step) AS g) AS y),
            (SELECT xmlagg(xmlelement(NAME text, xmlattributes('middle' AS "text-anchor", round(c_left + (j - 0.5) * v_column, 1) AS x, c_top + c_height + 18 AS y),
                    to_char(p_times[j], v_format)) ORDER BY j)
                FROM generate_series(1, v_n, greatest(ceil(v_n / 8.0)::int, 1)) AS j),
            xmlelement(NAME text, xmlattributes('start' AS "text-anchor", 0 AS x, c_top + c_height + 36 AS y), p_unit),
            (SELECT xmlagg(xmlelement(NAME rect, xmlattributes('s' || p_colours[b.i] AS class, round(c_left + (b.j - 1) * v_column + v_column * 0.1, 1) AS x,
                        round(v_column * 0.8, 1) AS width, round(c_top + c_height - (b.below + b.value) * v_scale, 1) AS y, round(b.value * v_scale, 1) AS height),
                        xmlelement(NAME title, format('%s: %s %s', to_char(p_times[b.j], v_format), redrive._report_number(b.value), p_names[b.i]))) ORDER BY b.j, b.i)
                FROM (SELECT i, j, p_values[i][j] AS value,
                        coalesce(sum(p_values[i][j]) OVER (PARTITION BY j ORDER BY i ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS below
                    FROM generate_series(1, cardinality(p_names)) AS i CROSS JOIN generate_series(1, v_n) AS j) AS b
                WHERE b.value > 0))),
        xmlelement(NAME figcaption, (
            SELECT xmlagg(xmlelement(NAME span, xmlattributes('key' AS class),
                    xmlelement(NAME span, xmlattributes('box s' || p_colours[i] AS class, 'true' AS "aria-hidden"), ' '), ' ' || p_names[i]) ORDER BY i)
            FROM generate_series(1, cardinality(p_names)) AS i)),
        xmlelement(NAME details, xmlelement(NAME summary, 'Numbers'),
            xmlelement(NAME div, xmlattributes('scroll' AS class, '0' AS tabindex, 'region' AS role, 'Numbers: ' || p_title AS "aria-label"), xmlelement(NAME table,
                xmlelement(NAME thead, xmlelement(NAME tr, xmlelement(NAME th, xmlattributes('col' AS scope), 'from'), (
                    SELECT xmlagg(xmlelement(NAME th, xmlattributes('col' AS scope, 'n' AS class), p_names[i]) ORDER BY i) FROM generate_series(1, cardinality(p_names)) AS i))),
                xmlelement(NAME tbody, (
                    SELECT xmlagg(xmlelement(NAME tr, xmlelement(NAME td, to_char(p_times[j], 'YYYY-MM-DD HH24:MI')), (
                            SELECT xmlagg(xmlelement(NAME td, xmlattributes('n' AS class), redrive._report_number(p_values[i][j])) ORDER BY i)
                            FROM generate_series(1, cardinality(p_names)) AS i)) ORDER BY j)
                    FROM generate_series(1, v_n) AS j
                    WHERE EXISTS (SELECT FROM generate_series(1, cardinality(p_names)) AS i WHERE p_values[i][j] > 0)))))));
END
$$;

-- One part of the page.
CREATE FUNCTION redrive._report_section(p_id text, p_title text, p_note text, p_content xml) RETURNS xml
LANGUAGE sql IMMUTABLE AS $$
    SELECT xmlelement(NAME section, xmlattributes($1 AS id, $1 || '-title' AS "aria-labelledby"),
        xmlelement(NAME h2, xmlattributes($1 || '-title' AS id), $2),
        CASE WHEN $3 <> '' THEN xmlelement(NAME p, xmlattributes('note' AS class), $3) END,
        $4)
$$;

-- Up to 48 parts of the time, at round moments; in hours, for a day may have 23 or 25.
CREATE FUNCTION redrive._report_parts(p_since interval, OUT part interval, OUT origin timestamptz, OUT first timestamptz, OUT unit text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT x.b, date_trunc('day', now()), date_bin(x.b, now() - $1, date_trunc('day', now())), 'per ' || x.n
    FROM (VALUES (interval '1 min', 'minute'), ('5 min', '5 minutes'), ('15 min', '15 minutes'), ('30 min', '30 minutes'), ('1 hour', 'hour'),
        ('3 hours', '3 hours'), ('6 hours', '6 hours'), ('24 hours', 'day'), ('168 hours', 'week'), ('720 hours', '30 days'), ('8760 hours', '365 days')) AS x (b, n)
    WHERE x.b * 48 >= $1 OR x.b >= interval '365 days'
    ORDER BY x.b LIMIT 1
$$;

-- The charts: what ended in each part of the time.
CREATE FUNCTION redrive._report_charts(p_since interval) RETURNS xml
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p record;
    v_times timestamptz[];
    v_good numeric[];
    v_ignored numeric[];
    v_failed numeric[];
    v_retry numeric[];
BEGIN
    SELECT * INTO p FROM redrive._report_parts(p_since);
    SELECT array_agg(t.at ORDER BY t.at), array_agg(coalesce(e.succeeded, 0) ORDER BY t.at), array_agg(coalesce(e.ignored, 0) ORDER BY t.at),
        array_agg(coalesce(e.failed, 0) ORDER BY t.at), array_agg(coalesce(e.done - e.succeeded - e.ignored - e.failed, 0) ORDER BY t.at)
    INTO v_times, v_good, v_ignored, v_failed, v_retry
    FROM generate_series(p.first, now(), p.part) AS t (at)
    LEFT JOIN (
        SELECT date_bin(p.part, x.finished_at, p.origin) AS at,
            sum(x.done) AS done, sum(x.succeeded) AS succeeded, sum(x.ignored) AS ignored, sum(x.failed) AS failed
        FROM redrive._ended AS x
        WHERE x.finished_at >= p.first
        GROUP BY 1) AS e ON e.at = t.at;
    RETURN xmlconcat(
        redrive._report_section('throughput', 'Items done', 'Attempts by the time at which their chunk ended.',
            redrive._report_chart('Items done over time', 'items ' || p.unit, v_times, ARRAY['succeeded', 'ignored', 'failed', 'to be retried'], ARRAY[1, 2, 3, 4],
                ARRAY[v_good, v_ignored, v_failed, v_retry])),
        redrive._report_section('failures', 'Items that did not succeed', '',
            redrive._report_chart('Items that did not succeed over time', 'items ' || p.unit, v_times, ARRAY['ignored', 'failed', 'to be retried'], ARRAY[2, 3, 4],
                ARRAY[v_ignored, v_failed, v_retry])));
END
$$;

-- The same of pushes; nothing where there is no platform.
CREATE FUNCTION redrive._report_pushes(p_since interval) RETURNS xml
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p record;
    v_times timestamptz[];
    v_delivered numeric[];
    v_charged numeric[];
    v_free numeric[];
BEGIN
    IF NOT EXISTS (SELECT FROM redrive.platform_health) THEN
        RETURN NULL;
    END IF;
    SELECT * INTO p FROM redrive._report_parts(p_since);
    SELECT array_agg(t.at ORDER BY t.at), array_agg(coalesce(e.delivered, 0) ORDER BY t.at), array_agg(coalesce(e.charged, 0) ORDER BY t.at), array_agg(coalesce(e.free, 0) ORDER BY t.at)
    INTO v_times, v_delivered, v_charged, v_free
    FROM generate_series(p.first, now(), p.part) AS t (at)
    LEFT JOIN (
        SELECT date_bin(p.part, x.finished_at, p.origin) AS at,
            count(*) FILTER (WHERE x.delivered) AS delivered, count(*) FILTER (WHERE NOT x.delivered AND x.charged) AS charged, count(*) FILTER (WHERE NOT x.delivered AND NOT x.charged) AS free
        FROM redrive._pushed AS x
        WHERE x.finished_at >= p.first
        GROUP BY 1) AS e ON e.at = t.at;
    RETURN redrive._report_section('pushes', 'Pushes', 'Attempts by the time at which they ended.',
        redrive._report_chart('Pushes over time', 'attempts ' || p.unit, v_times, ARRAY['delivered', 'failed', 'failed at no cost'], ARRAY[1, 3, 4],
            ARRAY[v_delivered, v_charged, v_free]));
END
$$;

-- Without JIT, which takes longer to compile its many queries than they run.
CREATE FUNCTION redrive.report_html(since interval DEFAULT '24 h') RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    v_body xml;
    v_tiles xml;
    c_style constant text := $css$
:root { color-scheme: light dark; --back: #fff; --fore: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa; --s1: #1a7f4b; --s2: #8a6d00; --s3: #cf222e; --s4: #0969da; --good: #1a7f4b; --bad: #b3151f; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --fore: #e6edf3; --soft: #9aa5b1; --line: #3d444d; --card: #161b22; --s1: #3fb374; --s2: #d2a106; --s3: #f47067; --s4: #58a6ff; --good: #3fb374; --bad: #ff8f86; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--fore); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; } .note, .empty, footer, header p { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .5rem; margin: 1rem 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .75rem; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tiles .bad b { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; max-width: 30rem; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
progress { width: 6rem; accent-color: var(--s1); } figure { margin: 0; } svg { width: 100%; min-width: 34rem; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } .grid { stroke: var(--line); }
.s1 { fill: var(--s1); background: var(--s1); } .s2 { fill: var(--s2); background: var(--s2); } .s3 { fill: var(--s3); background: var(--s3); } .s4 { fill: var(--s4); background: var(--s4); }
.key { margin-right: 1rem; white-space: nowrap; } .box { display: inline-block; width: .8em; height: .8em; border-radius: 2px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
summary { cursor: pointer; color: var(--soft); margin: .5rem 0; } :focus-visible { outline: 2px solid var(--s4); }
@media print { html { font-size: 11px; } body { max-width: none; font-size: 1rem; } svg { min-width: 0; } section { break-inside: avoid-page; } details, progress { display: none; } .scroll { overflow: visible; }
    th, td, td.long, .n { white-space: normal; overflow-wrap: anywhere; min-width: 0; padding: .1rem .2rem; } }
$css$;
BEGIN
    IF since IS NULL THEN
        RAISE EXCEPTION 'since must not be null' USING ERRCODE = '22004', HINT = 'Leave the argument out for the last 24 hours.';
    ELSIF since < interval '1 min' OR since > interval '20 years' THEN
        RAISE EXCEPTION 'invalid value for "since"' USING ERRCODE = '22023', DETAIL = format('It is %s.', since), HINT = 'Give a time from 1 minute to 20 years.';
    END IF;

    SELECT xmlelement(NAME ul, xmlattributes('tiles' AS class), xmlagg(
            xmlelement(NAME li, xmlattributes(CASE WHEN t.bad AND t.value > 0 THEN 'bad' END AS class, t.id AS id), xmlelement(NAME b, redrive._report_number(t.value)), t.label) ORDER BY t.place))
    INTO v_tiles
    FROM (
        SELECT 1, 'tile-live', 'batches live', count(*), false FROM redrive.batch_progress AS b WHERE b.state NOT IN ('finished', 'cancelled')
        UNION ALL
        SELECT 2, 'tile-done', 'items done', coalesce(sum(e.done), 0), false FROM redrive._ended AS e WHERE e.finished_at >= now() - since
        UNION ALL
        SELECT 3, 'tile-failed', 'items failed', coalesce(sum(e.failed), 0), true FROM redrive._ended AS e WHERE e.finished_at >= now() - since
        UNION ALL
        SELECT 4, 'tile-waiting', 'retries waiting', coalesce(sum(q.waiting_retry), 0), false FROM redrive.queue_stats AS q
        UNION ALL
        SELECT 5, 'tile-stale', 'batches stale', count(*), true FROM redrive.stale_batches
        UNION ALL
        SELECT 6, 'tile-workers', 'workers', count(*), false FROM redrive.workers
        UNION ALL
        SELECT 7, 'tile-due', 'pushes due', coalesce(sum(h.due), 0), false FROM redrive.platform_health AS h
    ) AS t (place, id, label, value, bad);

    v_body := xmlconcat(
        xmlelement(NAME header, xmlelement(NAME h1, 'pg_redrive: ' || current_database()),
            xmlelement(NAME p, format('%s to %s (%s), as %s sees it. PostgreSQL %s.', to_char(now() - since, 'YYYY-MM-DD HH24:MI'), to_char(now(), 'YYYY-MM-DD HH24:MI:SS'),
                current_setting('TimeZone'), current_user, current_setting('server_version')))),
        xmlelement(NAME main,
            v_tiles,
            redrive._report_table('batches', 'Batches now', '',
                $q$SELECT b.batch_id::text AS batch, b.handler, coalesce(b.label, '') AS label, b.state, b.percent_done AS progress, b.total, b.succeeded, b.ignored, b.failed, b.waiting,
                    b.items_per_second AS "items/s", b.time_left::text AS "time left"
                FROM redrive.batch_progress AS b WHERE b.state NOT IN ('finished', 'cancelled')
                ORDER BY b.state, b.priority DESC, b.batch_id LIMIT 100$q$, 'No batch is live.'),
            redrive._report_charts(since),
            redrive._report_table('groups', 'Failures in groups', 'The largest groups, whenever they failed; sample messages are shown to the owner''s members only.',
                $q$SELECT g.handler, g.error_class AS class, g.sqlstate AS "SQLSTATE", left(g.sample_message, 300) AS "sample message", g.items, g.waiting, g.failed,
                    to_char(g.last_seen, 'YYYY-MM-DD HH24:MI') AS "last seen", g.fingerprint
                FROM redrive.failure_groups AS g ORDER BY g.items DESC, g.fingerprint, g.handler LIMIT 30$q$, 'Nothing has failed.'),
            redrive._report_table('retries', 'Retries waiting', '',
                $q$SELECT f.handler, count(*) FILTER (WHERE f.next_attempt_at <= now()) AS "due", count(*) FILTER (WHERE f.next_attempt_at > now() AND f.next_attempt_at <= now() + interval '5 min') AS "in 5 minutes",
                    count(*) FILTER (WHERE f.next_attempt_at > now() + interval '5 min' AND f.next_attempt_at <= now() + interval '1 hour') AS "in an hour",
                    count(*) FILTER (WHERE f.next_attempt_at > now() + interval '1 hour') AS "later", count(*) FILTER (WHERE f.next_attempt_at IS NULL) AS "for the pass", count(*) AS total,
                    to_char(min(f.next_attempt_at), 'YYYY-MM-DD HH24:MI:SS') AS "next"
                FROM redrive._waiting AS f GROUP BY f.handler ORDER BY f.handler$q$, 'No item waits for a retry.'),
            redrive._report_table('stale', 'Stale batches', '',
                $q$SELECT s.batch_id::text AS batch, s.handler, s.reason, to_char(s.since, 'YYYY-MM-DD HH24:MI:SS') AS since, s.action AS "what is done"
                FROM redrive.stale_batches AS s ORDER BY s.since, s.batch_id LIMIT 100$q$, 'No batch is stale.'),
            redrive._report_table('queues', 'Handlers', '',
                $q$SELECT q.handler, q.workers, q.max_workers AS "workers at most", CASE WHEN q.paused THEN 'paused' ELSE 'on' END AS state, q.ready, q.delayed, q.in_flight AS "in flight",
                    q.waiting_retry AS "waiting for retry", q.oldest_ready_age::text AS "oldest ready"
                FROM redrive.queue_stats AS q ORDER BY q.handler$q$, 'There are no handlers.'),
            redrive._report_table('workers', 'Workers', '',
                $q$SELECT coalesce(w.pid::text, w.worker) AS worker, w.kind, w.role, w.handler, w.batch_id::text AS batch, w.state, w.item_no AS item, date_trunc('second', now() - w.item_started_at)::text AS "in it for", w.items_per_second AS "items/s",
                    to_char(w.lease_until, 'YYYY-MM-DD HH24:MI:SS') AS "lease until"
                FROM redrive.workers AS w ORDER BY w.kind, w.pid, w.chunk_id$q$, 'No worker runs.'),
            redrive._report_table('passes', 'Passes', 'The last run of each.',
                $q$SELECT DISTINCT ON (p.pass) p.pass, to_char(p.started_at, 'YYYY-MM-DD HH24:MI:SS') AS started, round(extract(epoch FROM p.finished_at - p.started_at) * 1000, 1) AS "ms", p.acted AS "rows", p.detail
                FROM redrive.pass_history AS p ORDER BY p.pass, p.started_at DESC$q$, 'No pass has run: see redrive.schedule_passes().'),
            redrive._report_table('platforms', 'Platforms', '',
                $q$SELECT h.platform, CASE WHEN h.paused THEN 'paused' WHEN h.breaker = 'closed' THEN 'on' ELSE 'breaker ' || replace(h.breaker::text, '_', ' ') END AS state, coalesce(h.reason, '') AS reason,
                    to_char(h.blocked_until, 'YYYY-MM-DD HH24:MI:SS') AS until, h.due, h.oldest_due_age::text AS "oldest due", h.in_flight AS "in flight", h.waiting AS "waiting for retry", h.dead AS "given up", h.blocked,
                    h.attempts, h.delivered, h.per_second AS "pushes/s", h.p50_ms AS "median ms", h.p95_ms AS "95 % ms", to_char(h.last_delivered_at, 'YYYY-MM-DD HH24:MI:SS') AS "last delivered"
                FROM redrive.platform_health AS h ORDER BY h.platform$q$, 'There are no platforms.'),
            redrive._report_pushes(since),
            CASE WHEN has_function_privilege('redrive.doctor()', 'EXECUTE') AND has_column_privilege('redrive.batches', 'batch_id', 'SELECT') THEN
                redrive._report_table('doctor', 'Findings of doctor()', '',
                    'SELECT d.severity, d.finding, d.remedy FROM redrive.doctor() AS d', 'Nothing is wrong.') END),
        xmlelement(NAME footer, xmlelement(NAME p, 'Made by redrive.report_html() of pg_redrive.')));

    RETURN concat('<!DOCTYPE html>', E'\n<html lang="en"><head>', CASE pg_client_encoding() WHEN 'UTF8' THEN '<meta charset="utf-8">' END,
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        xmlelement(NAME title, 'pg_redrive: ' || current_database()), '<style>', c_style, '</style></head><body>', v_body, '</body></html>');
END
$$;
COMMENT ON FUNCTION redrive.report_html IS
'One self-contained HTML page: batches, throughput and failures over the time given, failure groups, retries, stale batches, workers, passes, platforms and their pushes, and what doctor() finds. It shows the caller what the views show. Write it to a file: PGCLIENTENCODING=UTF8 psql -XAtc "select redrive.report_html()" > report.html. Errors: 22004 NULL, 22023 not from 1 minute to 20 years.';
