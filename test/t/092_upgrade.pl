# The upgrade from each release makes what CREATE EXTENSION makes, object by object, and keeps data, rights and what uses the views.
# Fails if a table is changed in sql/ and not in sql/upgrade/, or scripts/upgrade-script leaves a statement out.
use strict;
use warnings;

use FindBin;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $root = "$FindBin::Bin/../..";
my @releases = map { /pg_redrive--([0-9.]+)\.sql$/ ? $1 : () } glob "$root/sql/releases/*.sql";
cmp_ok(scalar @releases, '>', 0, 'there are releases');

# One line for each thing of each member of the extension.  Columns of tables have no order: new ones come last.
my $catalog = <<'SQL';
SET search_path = pg_catalog;
CREATE TEMP TABLE member AS
SELECT d.classid, d.objid, i.type || ' ' || i.identity AS name
FROM pg_depend AS d CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) AS i
WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_redrive');
CREATE FUNCTION pg_temp.rights(a aclitem[]) RETURNS text LANGUAGE sql AS $$ SELECT string_agg(x::text, ' ' ORDER BY x::text) FROM unnest(a) AS x $$;
SELECT replace(line, E'\n', ' ') FROM (
    SELECT name || ': ' || coalesce(obj_description(objid, classid::regclass::name), 'no comment') FROM member
    UNION ALL
    SELECT name || ': at first ' || pg_temp.rights(i.initprivs) FROM member AS m JOIN pg_init_privs AS i ON i.classoid = m.classid AND i.objoid = m.objid AND i.objsubid = 0
    UNION ALL
    SELECT name || ': ' || pg_get_functiondef(p.oid) || coalesce(pg_temp.rights(p.proacl), 'default') || p.proowner::regrole || p.procost || ' ' || p.prorows
    FROM member AS m JOIN pg_proc AS p ON m.classid = 'pg_proc'::regclass AND p.oid = m.objid
    UNION ALL
    SELECT name || ': ' || concat_ws(' ', c.relkind, c.relpersistence, c.reloptions::text, c.relispartition, pg_get_partkeydef(c.oid), pg_get_expr(c.relpartbound, c.oid), pg_temp.rights(c.relacl), c.relowner::regrole)
        || CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) ELSE '' END
    FROM member AS m JOIN pg_class AS c ON m.classid = 'pg_class'::regclass AND c.oid = m.objid
    UNION ALL
    SELECT name || ', column ' || concat_ws(' ', CASE WHEN c.relkind IN ('v', 'c') THEN a.attnum END, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated, a.attstorage,
        a.attcollation::regcollation, pg_get_expr(f.adbin, f.adrelid), pg_temp.rights(a.attacl), col_description(c.oid, a.attnum))
    FROM member AS m
    JOIN pg_class AS c ON (m.classid = 'pg_class'::regclass AND c.oid = m.objid) OR (m.classid = 'pg_type'::regclass AND c.reltype = m.objid)
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef AS f ON f.adrelid = c.oid AND f.adnum = a.attnum
    UNION ALL
    SELECT name || ', constraint ' || k.conname || ' ' || pg_get_constraintdef(k.oid) FROM member AS m JOIN pg_constraint AS k ON m.classid = 'pg_class'::regclass AND k.conrelid = m.objid
    UNION ALL
    SELECT name || ', index ' || pg_get_indexdef(x.indexrelid) FROM member AS m JOIN pg_index AS x ON m.classid = 'pg_class'::regclass AND x.indrelid = m.objid
    UNION ALL
    SELECT name || ', trigger ' || pg_get_triggerdef(t.oid) FROM member AS m JOIN pg_trigger AS t ON m.classid = 'pg_class'::regclass AND t.tgrelid = m.objid AND NOT t.tgisinternal
    UNION ALL
    SELECT name || ', sequence ' || concat_ws(' ', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqcache, s.seqcycle) FROM member AS m JOIN pg_sequence AS s ON m.classid = 'pg_class'::regclass AND s.seqrelid = m.objid
    UNION ALL
    SELECT name || ': ' || string_agg(e.enumlabel, ' ' ORDER BY e.enumsortorder) FROM member AS m JOIN pg_enum AS e ON m.classid = 'pg_type'::regclass AND e.enumtypid = m.objid GROUP BY name
    UNION ALL
    SELECT 'dumped: ' || c.oid::regclass || ' ' || c.condition FROM pg_extension AS e CROSS JOIN LATERAL unnest(e.extconfig, e.extcondition) AS c (oid, condition) WHERE e.extname = 'pg_redrive'
    UNION ALL
    SELECT 'extension ' || concat_ws(' ', extversion, extnamespace::regnamespace, extowner::regrole, extrelocatable) FROM pg_extension WHERE extname = 'pg_redrive'
    UNION ALL
    SELECT 'rule ' || (to_jsonb(r) - 'hits')::text FROM redrive.classification_rules AS r WHERE r.builtin
    UNION ALL
    SELECT 'schema ' || concat_ws(' ', pg_temp.rights(nspacl), nspowner::regrole) FROM pg_namespace WHERE nspname = 'redrive'
) AS x (line) ORDER BY line COLLATE "C";
SQL

# One line for each right that was given on what users see.
my $rights = <<'SQL';
SELECT o.name || ' ' || x.grantee::regrole || ' ' || x.privilege_type FROM (
    SELECT c.relname, c.oid::regclass::text, c.relacl FROM pg_class AS c WHERE c.relnamespace = 'redrive'::regnamespace
    UNION ALL
    SELECT p.proname, p.oid::regprocedure::text, p.proacl FROM pg_proc AS p WHERE p.pronamespace = 'redrive'::regnamespace
) AS o (plain, name, acl) CROSS JOIN LATERAL aclexplode(o.acl) AS x
WHERE o.plain NOT LIKE '\_%' AND x.grantee IN ('clerk'::regrole, 'watcher'::regrole, 'looker'::regrole)
SQL

my $node = new_node('upgrade', conf => "redrive.max_workers = 0\n");
$node->safe_psql('postgres', 'CREATE DATABASE fresh TEMPLATE template0');
$node->safe_psql('fresh', 'CREATE EXTENSION pg_redrive');
my @fresh = split /\n/, $node->safe_psql('fresh', $catalog);
cmp_ok(scalar @fresh, '>', 1000, 'the catalogs were read');
$node->safe_psql('postgres', 'CREATE ROLE clerk LOGIN; CREATE ROLE watcher; CREATE ROLE looker; CREATE ROLE planted');

foreach my $release (@releases)
{
	(my $db = "from_$release") =~ tr/./_/;
	my $sql = sub { return $node->safe_psql($db, $_[0]) };

	# nothing but the extension
	$node->safe_psql('postgres', "CREATE DATABASE $db TEMPLATE template0");
	$sql->("CREATE EXTENSION pg_redrive VERSION '$release'");
	isnt($sql->($catalog), join("\n", @fresh), "$release is another version");
	$sql->('ALTER EXTENSION pg_redrive UPDATE');
	my %fresh = map { $_ => 1 } @fresh;
	my %upgraded = map { $_ => 1 } split /\n/, $sql->($catalog);
	my @missing = grep { !$upgraded{$_} } @fresh;
	my @more = grep { !$fresh{$_} } sort keys %upgraded;
	is(scalar(@missing) + @more, 0, "from $release: each object is what a fresh one is")
	  or diag(join("\n", "missing or other after the upgrade: say what changes in sql/upgrade/$release--*.sql", (map { '- ' . substr($_, 0, 300) } @missing), map { '+ ' . substr($_, 0, 300) } @more));
	$node->safe_psql('postgres', "DROP DATABASE $db");

	# in use: rights, views of users on ours, batches that are done, waiting and open, a source of tasks
	$node->safe_psql('postgres', "CREATE DATABASE $db TEMPLATE template0");
	$sql->("CREATE EXTENSION pg_redrive VERSION '$release'");
	$sql->("SELECT redrive.grant_user('clerk'), redrive.grant_monitor('watcher'); GRANT CREATE ON SCHEMA public TO clerk");
	$sql->("GRANT USAGE ON SCHEMA redrive TO looker; GRANT SELECT ON redrive.push_status, redrive.platform_health TO looker");
	$sql->("\\set release $release\n" . <<'SQL');
SET SESSION AUTHORIZATION clerk;
CREATE FUNCTION approve(payload jsonb) RETURNS void LANGUAGE sql AS 'SELECT 1 / (payload ->> 0)::int';
SELECT redrive.create_handler('approve', 'approve', retry_delay => '1 h');
SELECT redrive.submit('approve', ARRAY['[1]', '[0]', '["x"]']::jsonb[], keys => ARRAY['a', 'b', 'c']);
RESET SESSION AUTHORIZATION;
-- no engine of the release is here; ours works if it takes the objects for its own
UPDATE pg_extension SET extversion = redrive._library_version() WHERE extname = 'pg_redrive';
SET SESSION AUTHORIZATION clerk;
CALL redrive.work();
RESET SESSION AUTHORIZATION;
UPDATE pg_extension SET extversion = :'release' WHERE extname = 'pg_redrive';
SET SESSION AUTHORIZATION clerk;
SELECT redrive.submit('approve', ARRAY['[1]', '[2]']::jsonb[], label => 'waits');
CREATE VIEW mine AS SELECT batch_id, succeeded FROM redrive.batch_progress;
CREATE VIEW my_pushes AS SELECT task_key, state, attempts, lease_until FROM redrive.push_status;
CREATE VIEW my_platforms AS SELECT * FROM redrive.platform_health;
CREATE TABLE forms (no int PRIMARY KEY, state text);
SELECT redrive.attach_task_source('forms', 'no', 'state');
SELECT redrive.create_platform('desk', 'https://192.0.2.1/'), redrive.pause_platform('desk');
INSERT INTO forms VALUES (1, 'new');
SQL
	my %before = map { $_ => 1 } split /\n/, $sql->($rights);
	like($sql->('SELECT remedy FROM redrive.doctor()'), qr/ALTER EXTENSION pg_redrive UPDATE/, "from $release: doctor() tells that it is due");
	# what a release allowed and no pass can add up.  Seen red: without the UPDATE of batches, timestamp out of range
	$sql->(<<'SQL');
SET SESSION AUTHORIZATION clerk;
SELECT redrive.create_handler('far', 'approve', start_timeout => '178000000 years', stale_after => '1000000 years -359999999 days', retry_window => '24 h');
SELECT redrive.submit('far', ARRAY['[1]']::jsonb[], label => 'far');
RESET SESSION AUTHORIZATION;
UPDATE redrive.batches SET run_at = '294276-12-31 23:30', serve_after = '294276-12-31 23:30' WHERE label = 'far';
SQL
	# rights that would come to whatever is new
	$sql->('ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO planted; ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO planted');
	$sql->('ALTER EXTENSION pg_redrive UPDATE');
	unlike($sql->('SELECT remedy FROM redrive.doctor()'), qr/UPDATE/, 'and not any more');
	is($sql->(q{SELECT start_timeout, stale_after, retry_window FROM redrive.handlers WHERE name = 'far'}), '100 years|1 day|24:00:00', 'settings have limits');
	is($sql->(q{SELECT reason FROM redrive.stale_batches_at('infinity') WHERE handler = 'far'}), 'never_started', 'and batches a time that can be added to');
	delete @before{ split /\n/, $sql->($rights) };
	is(join("\n", sort keys %before), '', 'rights were kept');
	is($sql->(q{SELECT count(*) FROM pg_class WHERE relacl::text LIKE '%planted%'}) . $sql->(q{SELECT count(*) FROM pg_proc WHERE proacl::text LIKE '%planted%'}), '00', 'nobody got rights on what is new');
	$sql->("SELECT redrive.grant_user('clerk'), redrive.grant_monitor('watcher')");
	$sql->("SET SESSION AUTHORIZATION clerk; CALL redrive.work(); UPDATE forms SET state = 'done'");
	is($sql->('SELECT string_agg(succeeded::text, $$,$$ ORDER BY batch_id) FROM mine'), '1,2,0', 'what waited was done, and the view of a user works');
	is($sql->(q{SELECT count(*) FILTER (WHERE state = 'failed'), count(*) FILTER (WHERE state = 'waiting') FROM redrive.failed_items}), '2|0', 'failures are there')
	  or diag($sql->('SELECT item_no, state, sqlstate FROM redrive.failed_items'));
	is($sql->('SELECT (SELECT count(*) FROM my_pushes), (SELECT count(*) FROM my_platforms)'), '1|1', 'views of a user on those of pushes, too');
	is($sql->('SELECT status, version FROM redrive.task_status'), 'done|2', 'the source of tasks works');
	is($sql->('SELECT count(*) FROM redrive.verify() WHERE NOT ok'), 0, 'the counters are right');
	like($sql->('SET ROLE watcher; SELECT length(redrive.report_html())'), qr/^\d+$/, 'a monitor gets the report');

	# Between the restart with the new library and the update nothing is run, pushed or claimed, and nothing is lost.
	#
	# Seen red: without redrive_version_fits() (base/spi_call.c) nothing is said and work begins; with it in processes only claim() finds no column "lot", and work() runs batches.
	my $from = -s $node->logfile;
	$db =~ s/^from/waits/;
	$node->safe_psql('postgres', "CREATE DATABASE $db TEMPLATE template0");
	$node->adjust_conf('postgresql.conf', 'redrive.max_workers', '2');
	$node->reload;
	$sql->("CREATE EXTENSION pg_redrive VERSION '$release'; CREATE FUNCTION approve(payload jsonb) RETURNS void LANGUAGE sql AS ''; SELECT redrive.create_handler('approve', 'approve'), redrive.create_handler('outside', kind => 'external'), redrive.create_platform('desk', 'https://192.0.2.1/')");
	ok($node->wait_for_log(qr/WARNING:  pg_redrive does not work in database "$db" before it is updated/, $from), "with objects of $release the supervisor says once that it waits");
	$sql->("SELECT redrive.submit('approve', ARRAY['1']::jsonb[]), redrive.submit('outside', ARRAY['1']::jsonb[]), redrive.record_task('form', 'new'); CALL redrive.run_pass('rescue_stale'); CALL redrive.run_pass('push_tasks')");
	foreach my $call ("SELECT redrive.claim('outside')", 'CALL redrive.work()')
	{
		my (undef, undef, $error) = $node->psql($db, "\\set VERBOSITY verbose\n$call");
		like($error, qr/55000: pg_redrive does not work in database "$db" before it is updated\nDETAIL:  The library is of version .*, the SQL objects of this database are of version $release\.\nHINT:  Run ALTER EXTENSION pg_redrive UPDATE/, "$call does, too");
	}
	is($sql->("SELECT string_agg(state::text, ' '), (SELECT string_agg(state || ' ' || attempts, ' ') FROM redrive.push_status) FROM redrive.batch_progress"), 'ready ready|pending 0', 'what is submitted and recorded waits');
	$sql->('ALTER EXTENSION pg_redrive UPDATE');
	ok(poll_until($node, "SELECT state FROM redrive.batch_progress WHERE handler = 'approve'", 'finished', dbname => $db), 'with the update executors begin by themselves');
	ok(poll_until($node, 'SELECT attempts > 0 FROM redrive.push_status', 't', dbname => $db), '... the pusher, too');
	is($sql->("SELECT item_no FROM redrive.claim('outside')"), 1, '... and external workers claim');
	my $log = slurp_file($node->logfile, $from);
	is(scalar(() = $log =~ /WARNING:  pg_redrive does not work/g), 1, 'it was said once');
	unlike($log, qr/ERROR: (?!.*pg_redrive does not work)/, '... and nothing went wrong');
	$node->adjust_conf('postgresql.conf', 'redrive.max_workers', '0');
	$node->reload;
}

$node->stop;
done_testing();
