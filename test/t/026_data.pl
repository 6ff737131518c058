# Data: dump and restore of live batches, settings and encodings other than ours,
# large payloads, logical replication of what handlers write, and a full disk.
use strict;
use warnings;

use File::Temp;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $small = $ENV{REDRIVE_SMALL_DISK};
my $node = new_node(
	'data',
	extension => 0,
	streaming => 1,
	conf => "redrive.max_workers = 3\njit = off\nwal_level = logical\nmax_worker_processes = 32");

my $function = q{
CREATE TABLE effects (key text, item bigint);
CREATE FUNCTION do_item(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.effects VALUES (item.key, item.item_no);
    IF item.payload->>'wait' IS NOT NULL THEN
        PERFORM public.wait_for_gate('data');
    ELSIF item.item_no % 10 = 3 THEN
        PERFORM redrive.raise_validation('not wanted');
    ELSIF item.item_no % 10 = 5 THEN
        RAISE EXCEPTION 'no good: %', item.key USING ERRCODE = '22023', DETAIL = item.payload;
    ELSIF item.item_no % 10 = 7 AND item.attempt = 1 THEN
        RAISE EXCEPTION 'not yet';
    END IF;
END $$;
};

# Create the extension, a gate and the handler.
sub populate
{
	my ($on, $dbname) = @_;

	$on->safe_psql($dbname, "CREATE EXTENSION pg_redrive; CREATE TABLE gates (gate text PRIMARY KEY, open boolean NOT NULL)");
	$on->safe_psql($dbname, q{
CREATE FUNCTION wait_for_gate(name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    WHILE NOT coalesce((SELECT open FROM public.gates WHERE gate = name), true) LOOP
        PERFORM pg_catalog.pg_sleep(0.01); -- slow handler
    END LOOP;
END $$;
} . $function . "SELECT redrive.create_handler('work', 'do_item', retry_delay => '20 ms')");
	return;
}

# --- dump with batches in each state, restore beside the original and elsewhere
$node->safe_psql('postgres', 'CREATE DATABASE origin');
populate($node, 'origin');
$node->safe_psql('origin', "SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 100) AS i), label => 'finished')");
batch_is($node, 'finished', 'finished', 'origin');
set_gate($node, 'data', 0, 'origin');
$node->safe_psql(
	'origin', q{
INSERT INTO redrive.classification_rules (sqlstate_pattern, error_class, action) VALUES ('ZZ001', 'mine', 'fail');
SELECT redrive.submit('work', ARRAY(SELECT CASE i WHEN 8 THEN '{"wait": 1}' ELSE to_jsonb(i) END FROM generate_series(1, 100) AS i),
    ARRAY(SELECT 'key ' || i FROM generate_series(1, 100) AS i), label => 'running');
SELECT redrive.submit('work', ARRAY['1', '2']::jsonb[], ARRAY['later', NULL], run_at => now() + interval '1 day', label => 'later');
SELECT redrive.add_items(redrive.open_batch('work', label => 'open'), ARRAY['1']::jsonb[]);
SELECT redrive.create_platform('desk', 'https://192.0.2.1/'), redrive.pause_platform('desk'), redrive.record_task('form', 'new');
});
ok(poll_until($node, "SELECT count(*) FROM redrive.workers WHERE item_no = 8", '1', dbname => 'origin'), 'a worker is within an item');
my $dir = File::Temp->newdir();
command_ok([ 'pg_dump', '-f', "$dir/dump.sql", $node->connstr('origin') ], 'pg_dump of live batches');
command_ok([ 'pg_dump', '-Fc', '-f', "$dir/dump", $node->connstr('origin') ], '... in a format for pg_restore');
my $elsewhere = new_node('elsewhere', extension => 0, conf => 'redrive.enabled = off');
$node->append_conf('postgresql.conf', 'redrive.enabled = off');
$node->reload;
# Beside the original the process that has the chunk is alive, within the item.
#
# Seen red: without datid in redrive._running_chunks nobody takes the chunk there.
foreach my $on ($node, $elsewhere)
{
	$on->safe_psql('postgres', 'CREATE DATABASE restored');
	command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $on->connstr('restored'), '-f', "$dir/dump.sql" ], 'restore on ' . $on->name);
	is($on->safe_psql('restored', "SELECT count(*) FROM redrive.batch_progress WHERE label IN ('finished', 'running', 'later', 'open')"), '4', '... all batches');
	is($on->safe_psql('restored', "SELECT count(*) FROM redrive._running_chunks WHERE alive"), '0', '... the chunk that ran has no worker here');
	verified_ok($on, 'restored on ' . $on->name, 'restored');
	is($on->safe_psql('restored', "SELECT redrive.is_locked('work', 'later'), (redrive.classify('work', 'ZZ001')).error_class"), 't|mine', '... locks and rules');
}

# In parallel, as docs/operations.md says.
#
# Seen red: with one pg_restore -j 4, "violates foreign key constraint".
$elsewhere->safe_psql('postgres', 'CREATE DATABASE parallel');
foreach my $part ([ '--section=pre-data' ], [ '--section=data', '-n', 'redrive' ], [ '--section=data', '--section=post-data', '-N', 'redrive', '-j', '4' ])
{
	command_ok([ 'pg_restore', '-d', $elsewhere->connstr('parallel'), @$part, "$dir/dump" ], "pg_restore @$part");
}
my $restored = q{SELECT (SELECT count(*) FROM redrive.batch_progress), (SELECT count(*) FROM redrive.failed_items), (SELECT count(*) FROM redrive.push_status), (SELECT count(*) FROM redrive.platform_health), (SELECT count(*) > 0 FROM effects)};
is($elsewhere->safe_psql('parallel', $restored), $elsewhere->safe_psql('restored', $restored), '... has all that psql restores');
verified_ok($elsewhere, 'restored in parallel', 'parallel');
$elsewhere->safe_psql('postgres', 'DROP DATABASE parallel');
foreach my $on ($node, $elsewhere)
{
	$on->safe_psql('restored', "UPDATE gates SET open = true");
	$on->append_conf('postgresql.conf', 'redrive.enabled = on');
	$on->reload;
	ok(poll_until($on, 'SHOW redrive.enabled', 'on'), 'switched on on ' . $on->name);
	$on->safe_psql('restored', "CALL redrive.run_pass('rescue_stale')");
	batch_is($on, 'running', 'finished', 'restored');
	is($on->safe_psql('restored', "SELECT succeeded, ignored, failed FROM redrive.batch_progress WHERE label = 'running'"), '80|10|10', '... with all outcomes');
	is($on->safe_psql('restored', "SELECT count(*), count(DISTINCT key) FROM effects WHERE key LIKE 'key %'"), '80|80', '... each item once');
	is($on->safe_psql('restored', "SELECT redrive.submit('work', ARRAY['1']::jsonb[]) > (SELECT max(batch_id) FROM redrive.batch_progress WHERE label IS NOT NULL)"), 't',
		'... and new batches get new numbers');
	verified_ok($on, 'run on ' . $on->name, 'restored');
}
$elsewhere->stop;
set_gate($node, 'data', 1, 'origin');
batch_is($node, 'running', 'finished', 'origin');
is($node->safe_psql('origin', "SELECT count(*), count(DISTINCT key) FROM effects WHERE key LIKE 'key %'"), '80|80', '... in the original too, each item once');
$node->safe_psql('postgres', "DROP DATABASE $_") foreach ('restored', 'origin');

# --- encodings, and settings that change how values look as text
foreach my $case ([ 'utf8', 'UTF8', 'C.UTF-8' ], [ 'latin1', 'LATIN1', 'C' ], [ 'ascii', 'SQL_ASCII', 'C' ])
{
	my ($dbname, $encoding, $locale) = @$case;

	$node->safe_psql('postgres', "CREATE DATABASE $dbname ENCODING '$encoding' LOCALE '$locale' TEMPLATE template0");
	$node->safe_psql('postgres',
		"ALTER DATABASE $dbname SET DateStyle = 'SQL, DMY';
		 ALTER DATABASE $dbname SET IntervalStyle = 'sql_standard';
		 ALTER DATABASE $dbname SET TimeZone = 'Australia/Lord_Howe';
		 ALTER DATABASE $dbname SET lc_messages = 'C';
		 ALTER DATABASE $dbname SET standard_conforming_strings = off;
		 ALTER DATABASE $dbname SET bytea_output = 'escape';
		 ALTER DATABASE $dbname SET default_transaction_isolation = 'serializable'");
	populate($node, $dbname);
	my $umlaut = 'chr(252)';
	$node->safe_psql($dbname,
		"SELECT redrive.alter_handler('work', item_timeout => '20 s', retry_delay => '20 ms', retry_delay_max => '1 h', commit_interval => '100 ms');
		 SELECT redrive.submit('work', ARRAY(SELECT jsonb_build_object('text', 'gr' || $umlaut || 'n ' || i) FROM generate_series(1, 100) AS i),
		    ARRAY(SELECT 'schl' || $umlaut || 'ssel ' || i FROM generate_series(1, 100) AS i), run_at => now() - interval '1 day', label => 'text')");
	batch_is($node, 'text', 'finished', $dbname);
	is($node->safe_psql($dbname, "SELECT succeeded, ignored, failed FROM redrive.batch_progress"), '80|10|10', "$encoding: all outcomes");
	is($node->safe_psql($dbname, "SELECT count(*), bool_and(key LIKE 'schl' || $umlaut || 'ssel %') FROM effects"), '80|t', "$encoding: keys come as they were given");
	is($node->safe_psql($dbname, "SELECT bool_and(message = 'no good: ' || key AND detail LIKE '%gr' || $umlaut || 'n%') FROM redrive.failed_items WHERE state = 'failed'"),
		't', "$encoding: messages too");
	$node->safe_psql($dbname, "CALL redrive.run_pass('rescue_stale'); CALL redrive.run_pass('retry_failed'); CALL redrive.run_pass('purge')");
	isnt($node->safe_psql($dbname, 'SELECT count(*) FROM redrive.doctor() CROSS JOIN redrive.why((SELECT min(batch_id) FROM redrive.batches))'), '0', "$encoding: why() and doctor() answer");
	verified_ok($node, $encoding, $dbname);
}

# --- payloads
my $err;
$node->psql('utf8', q{SELECT redrive.submit('work', ARRAY['1', '{"nul": "\\\\u0000"}']::jsonb[], label => 'nul')}, stderr => \$err, extra_params => [ '-v', 'VERBOSITY=sqlstate' ]);
like($err, qr/ERROR:  22P0[25]/, 'a payload with \u0000 is refused');
is($node->safe_psql('utf8', "SELECT count(*) FROM redrive.batches WHERE label = 'nul'"), '0', '... and nothing is left of it');
$node->safe_psql('utf8',
	"SELECT redrive.submit('work', ARRAY[(repeat('[', 3000) || repeat(']', 3000))::jsonb, 'null', '\"\"', '{}', '1e1000'], label => 'odd')");
batch_is($node, 'odd', 'finished', 'utf8');
is($node->safe_psql('utf8', "SELECT succeeded, ignored, failed FROM redrive.batch_progress WHERE label = 'odd'"), '3|1|1', 'deep and empty payloads are like others');

# 200 MB in one batch: no process has more than a few items of it at a time
#
# Seen red: without "x.bytes <= $6" in fetch_items (src/flow/fetch.c).
$node->safe_psql(
	'utf8', q{
CREATE TABLE large (item bigint, bytes int, kb int);
CREATE FUNCTION take_large(item redrive.item) RETURNS void LANGUAGE sql AS
    $$INSERT INTO public.large VALUES (item.item_no, length(item.payload::text), substring(pg_read_file('/proc/self/status', 0, 10000, true) FROM 'RssAnon:\s+(\d+)')::int)$$;
SELECT redrive.create_handler('large', 'take_large');
SELECT redrive.submit_query('large', $$SELECT NULL::text AS key, to_jsonb(repeat('x', 1000000)) AS payload FROM generate_series(1, 200)$$, label => 'large');
});
batch_is($node, 'large', 'finished', 'utf8');
is($node->safe_psql('utf8', 'SELECT count(*), count(DISTINCT item), sum(bytes) FROM large'), '200|200|200000400', '200 items of 1 MB');
SKIP:
{
	skip 'memory cannot be measured here', 1 if !defined private_kb($$);
	cmp_ok($node->safe_psql('utf8', 'SELECT max(kb) FROM large'), '<', 24 * 1024, 'memory of an executor stays small');
}

# --- logical replication of what handlers write: each row once, whatever was rolled back
$node->safe_psql('postgres', 'CREATE DATABASE subscriber');
$node->safe_psql('utf8', q{TRUNCATE effects; CREATE PUBLICATION p FOR TABLE effects; SELECT pg_create_logical_replication_slot('s', 'pgoutput')});
$node->safe_psql('subscriber', 'CREATE TABLE effects (key text, item bigint); CREATE SUBSCRIPTION s CONNECTION $conn$' . $node->connstr('utf8') . '$conn$ PUBLICATION p WITH (create_slot = false, slot_name = \'s\', copy_data = false)');
$node->safe_psql('utf8', "SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 1000) AS i), label => 'replicated')");
batch_is($node, 'replicated', 'finished', 'utf8');
$node->wait_for_catchup('s', 'replay', $node->lsn('insert'));
is($node->safe_psql('subscriber', 'SELECT count(*), count(DISTINCT item) FROM effects'), '800|800', 'a subscriber gets what handlers wrote, once');
$node->safe_psql('subscriber', 'DROP SUBSCRIPTION s');
$node->stop;

# --- a full disk
SKIP:
{
	skip 'no small file system to fill: REDRIVE_SMALL_DISK, which scripts/check makes where it may mount one', 1 if !$small;

	my $full = new_node('full', extension => 0, conf => "redrive.max_workers = 2\njit = off");
	my $space = "$small/space";
	mkdir $space or die "could not make a directory in $small: $!";

	# Leave so many bytes of the disk, or all of it.
	my $leave = sub {
		my ($bytes) = @_;
		unlink "$small/ballast";
		return if !defined $bytes;
		my ($free) = `df --output=avail -B1 $small` =~ /(\d+)\s*$/;
		open(my $file, '>', "$small/ballast") or die "could not write to $small: $!";
		my $block = "\0" x 65536;
		for (my $left = $free - $bytes; $left > 0; $left -= 65536)
		{
			last if !syswrite($file, $block);
		}
		close($file);
		return;
	};

	# The tables of the handler are on the small disk; ours are too in the second
	# database.
	$full->safe_psql('postgres', "CREATE TABLESPACE small LOCATION '$space'");
	$full->safe_psql('postgres', $_) foreach ('CREATE DATABASE theirs', 'CREATE DATABASE ours TABLESPACE small');
	foreach my $dbname ('theirs', 'ours')
	{
		$full->safe_psql($dbname,
			"CREATE EXTENSION pg_redrive;
			 CREATE TABLE effects (item int, filler text) TABLESPACE small;
			 CREATE FUNCTION do_item(payload jsonb) RETURNS void LANGUAGE sql AS
			 \$\$INSERT INTO public.effects VALUES (payload::int, repeat('x', 1000))\$\$;
			 SELECT redrive.create_handler('work', 'do_item', max_retries => 0)");
	}

	# Submit items and look at the end.
	my $submit = sub {
		my ($dbname, $items) = @_;
		$full->safe_psql($dbname, "SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, $items) AS i), label => 'full')");
		return;
	};
	my $goes_on = sub {
		my ($dbname, $items) = @_;
		batch_is($full, 'full', 'finished', $dbname);
		is($full->safe_psql($dbname, 'SELECT count(*), count(DISTINCT item) FROM effects'), "$items|$items", '... each item once');
		verified_ok($full, 'with room on the disk', $dbname);
		return;
	};

	$leave->(1_000_000);
	$submit->('theirs', 3000);
	ok(poll_until($full, "SELECT waiting > 0 AND state = 'retrying' FROM redrive.batch_progress", 't', dbname => 'theirs'), 'the disk of the handler is full: items wait');
	is($full->safe_psql('theirs', 'SELECT DISTINCT sqlstate, error_class, retry_count FROM redrive.failures'), '53100|infrastructure|0', '... with the reason, and it costs no retry');
	verified_ok($full, 'while the disk is full', 'theirs');
	$leave->();
	$goes_on->('theirs', 3000);
	$full->safe_psql('theirs', 'TRUNCATE effects');

	my $offset = -s $full->logfile;
	$leave->(12_000_000);
	$submit->('ours', 18000);
	$full->wait_for_log(qr/redrive executor.* exited with exit code 1/, $offset);
	like(slurp_file($full->logfile, $offset), qr/ERROR:  could not extend file .*No space left on device/, 'our disk is full: executors end, and the log tells why');
	is($full->safe_psql('ours', "SELECT state FROM redrive.batch_progress"), 'running', '... the batch is as it was');
	verified_ok($full, 'while our disk is full', 'ours');
	$leave->();
	$full->safe_psql('ours', "CALL redrive.run_pass('rescue_stale')");
	$goes_on->('ours', 18000);
	cmp_ok(scalar(() = slurp_file($full->logfile, $offset) =~ /(LOG|WARNING|ERROR|FATAL):  (?!statement)/g), '<', 60, '... and the log was not flooded');
	$full->stop;
}

done_testing();
