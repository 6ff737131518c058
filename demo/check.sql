-- The outcome, counted from the demo's own tables: nothing lost, nothing done twice.
WITH batch AS (
    SELECT label, total, succeeded, ignored, failed FROM redrive.batch_progress
), input AS (
    SELECT name, field(body, 'Description') ~* '\m(transitional|dummy) (dummy )?package' AS transitional
    FROM stanza
)
SELECT c.what, c.expected, c.actual, c.expected = c.actual AS ok
FROM (
    SELECT 1 AS place, 'loaded + ignored + failed = stanzas' AS what,
        (SELECT count(*) FROM stanza) AS expected,
        (SELECT count(*) FROM package) + (SELECT ignored + failed FROM batch WHERE label = 'load the package index') AS actual
    UNION ALL
    SELECT 2, 'loaded = packages that are not transitional',
        (SELECT count(DISTINCT name) FROM input WHERE transitional IS NOT TRUE),
        (SELECT count(*) FROM package)
    UNION ALL
    SELECT 3, 'linked + failed = packages',
        (SELECT count(DISTINCT name) FROM input),
        (SELECT count(*) FROM linked) + (SELECT failed FROM batch WHERE label = 'link dependencies')
    UNION ALL
    SELECT 4, 'linked twice', 0, (SELECT count(*) - count(DISTINCT package) FROM linked)
    UNION ALL
    SELECT 5, 'keys unlocked = packages', (SELECT count(DISTINCT name) FROM input), (SELECT count(DISTINCT key) FROM unlocked)
    UNION ALL
    SELECT 6, 'keys unlocked twice', 0, (SELECT count(*) - count(DISTINCT key) FROM unlocked)
    UNION ALL
    SELECT 7, 'keys still locked', 0, (SELECT count(*) FROM redrive.locks)
) AS c
ORDER BY c.place;
