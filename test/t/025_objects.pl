# Objects vanish or change while workers use them: functions, roles, rights,
# tables, databases, the extension.  No command hangs, the log is not flooded, the
# batch is in a clear state, and what why() proposes is the remedy.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('objects', conf => "redrive.max_workers = 3\njit = off");

# seconds that a command may take before it counts as hanging
my $patience = 60;

# so many items that a batch still runs when a command has been given
my $many = 3000;

# Run a command that must not hang.
sub hang_free
{
	my ($sql, $name, $dbname) = @_;
	my ($out, $err, $timed_out);
	my $rc = $node->psql($dbname // 'postgres', $sql, stdout => \$out, stderr => \$err, timeout => $patience, timed_out => \$timed_out);

	return ok(!$timed_out && $rc == 0, $name) || diag($err);
}

my $offset = 0;

# Return the lines of the log that are not statements, since the last call.
sub log_lines
{
	my $log = slurp_file($node->logfile, $offset);
	$offset += length($log);
	return grep { /(LOG|WARNING|ERROR|FATAL|PANIC):  / && !/LOG:  (statement|checkpoint|received SIGHUP|parameter)/ } split /\n/, $log;
}

# No more than so many lines since the last call; one test.
sub log_is_short
{
	my ($most, $name) = @_;
	my @lines = log_lines();
	return cmp_ok(scalar(@lines), '<=', $most, "$name: the log is not flooded") || diag(join("\n", @lines));
}

# Submit items of a handler and wait until some are done.
sub start_batch
{
	my ($label, $items, %opt) = @_;
	my $dbname = $opt{dbname} // 'postgres';

	$items //= $many;
	log_lines();
	$node->safe_psql($dbname,
		"SELECT redrive.submit('work', ARRAY(SELECT jsonb_build_object('label', '$label') FROM generate_series(1, $items)), label => '$label');
		 CALL await('SELECT count(*) > $items / 10 FROM effects WHERE note = ''$label''')");
	return;
}

# All items of a batch were done once, in the table of the handler and in the books.
sub done_once
{
	my ($label, $items, $dbname) = @_;

	$items //= $many;
	batch_is($node, $label, 'finished', $dbname);
	is($node->safe_psql($dbname // 'postgres', "SELECT count(*), count(DISTINCT item) FROM effects WHERE note = '$label'"),
		"$items|$items", "$label: each item once");
	is($node->safe_psql($dbname // 'postgres', "SELECT count(*) FROM redrive.failures AS f JOIN redrive.batches AS b USING (batch_id) WHERE b.label = '$label'"),
		'0', "$label: no item was made to fail by it");
	is($node->safe_psql($dbname // 'postgres',
			"SELECT v.check_name FROM redrive.batches AS b CROSS JOIN LATERAL redrive.verify(b.batch_id) AS v WHERE b.label = '$label' AND NOT v.ok"),
		'', "$label: the books are right");
	return;
}

# Return the remedy that why() has for the fact.
sub remedy
{
	my ($label, $fact) = @_;
	return $node->safe_psql('postgres',
		"SELECT w.remedy FROM redrive.batches AS b CROSS JOIN LATERAL redrive.why(b.batch_id) AS w WHERE b.label = '$label' AND w.fact = '$fact'");
}

# A batch was paused for the reason; resume it when the remedy has been applied.
sub resume
{
	my ($label) = @_;
	$node->safe_psql('postgres', "SELECT redrive.resume_batch(batch_id) FROM redrive.batches WHERE label = '$label'");
	return;
}

# The batch of an owner that was dropped is paused and says so; give the handler to
# another role by what why() proposes, and resume the batch.
sub owner_replaced
{
	my ($label, $handler) = @_;

	batch_is($node, $label, 'paused');
	like($node->safe_psql('postgres', "SELECT pause_reason FROM redrive.batch_progress WHERE label = '$label'"),
		qr/^handler "$handler" cannot run: its owner, the role with OID \d+, was dropped$/, '... and tells why');
	my $update = remedy($label, 'owner gone');
	like($update, qr/^UPDATE redrive.handlers SET owner = 'another_role' WHERE name = '$handler';$/, '... and why() tells what to do');
	log_is_short(10, $label);
	$update =~ s/another_role/heir/;
	$node->safe_psql('postgres', "GRANT ALL ON effects, gates TO heir; GRANT EXECUTE ON FUNCTION do_item TO heir; SELECT redrive.grant_user('heir'); $update");
	resume($label);
	return;
}

my $function = q{
CREATE FUNCTION do_item(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.effects (item, note) VALUES (item.item_no, item.payload ->> 'label');
    PERFORM pg_sleep(0.001); -- slow handler
END $$;
};

# Create the extension and what the handler needs, owned by app.
sub populate
{
	my ($dbname) = @_;

	$node->safe_psql($dbname, 'CREATE EXTENSION IF NOT EXISTS pg_redrive');
	create_effects($node, $dbname);
	create_await($node, $dbname);
	$node->safe_psql($dbname,
		"SELECT redrive.grant_user('app'); GRANT CREATE ON SCHEMA public TO app; SET ROLE app; $function
		 SELECT redrive.create_handler('work', 'do_item', max_retries => 0)");
	return;
}
$node->safe_psql('postgres', 'CREATE ROLE app LOGIN; CREATE ROLE heir LOGIN');
populate('postgres');

# --- the handler's function is replaced by another one: the batch goes on with that
#
# Seen red: without handler_gone in src/flow/segment.c up to a chunk of items fails
# with XX000, without any retry left.
start_batch('replaced');
hang_free("BEGIN; DROP FUNCTION do_item; $function ALTER FUNCTION do_item OWNER TO app; COMMIT", 'the function is dropped and made anew');
done_once('replaced');
log_is_short(0, 'function replaced');

# --- it is dropped
start_batch('dropped');
hang_free('DROP FUNCTION do_item', 'the function is dropped');
batch_is($node, 'dropped', 'paused');
like(remedy('dropped', 'handler function missing'), qr/^Create the function again/, '... and why() tells what to do');
$node->safe_psql('postgres', "SET ROLE app; $function");
resume('dropped');
done_once('dropped');
log_is_short(0, 'function dropped');

# --- EXECUTE is revoked
$node->safe_psql('postgres', 'ALTER FUNCTION do_item OWNER TO postgres; REVOKE ALL ON FUNCTION do_item FROM PUBLIC; GRANT EXECUTE ON FUNCTION do_item TO app');
start_batch('revoked');
hang_free('REVOKE EXECUTE ON FUNCTION do_item FROM app', 'EXECUTE is revoked');
batch_is($node, 'revoked', 'paused');
my $grant = remedy('revoked', 'handler function not executable');
is($grant, 'GRANT EXECUTE ON FUNCTION public.do_item(redrive.item) TO app;', '... and why() tells what to do');
$node->safe_psql('postgres', $grant);
resume('revoked');
done_once('revoked');
log_is_short(0, 'EXECUTE revoked');

# --- the handler's table is truncated, which waits for a commit interval, and locked
start_batch('truncated');
hang_free('TRUNCATE effects', 'the table of the handler is truncated');
batch_is($node, 'truncated');
cmp_ok($node->safe_psql('postgres', "SELECT count(*) FROM effects WHERE note = 'truncated'"), '<', $many, '... and has what was done afterwards');
log_is_short(0, 'table truncated');

# --- the table that has the items is truncated: the batch stops and says so
start_batch('lost items');
hang_free('TRUNCATE redrive.item_blocks', 'the items are truncated');
batch_is($node, 'lost items', 'paused');
like(remedy('lost items', 'paused'), qr/resume_batch/, '... and why() tells that it is paused');
$node->safe_psql('postgres', "SELECT redrive.cancel_batch(batch_id) FROM redrive.batches WHERE label = 'lost items'");
ok(poll_until($node, "SELECT finished_at IS NOT NULL FROM redrive.batches WHERE label = 'lost items'"), '... and can be cancelled');
log_is_short(0, 'items truncated');

# --- the owner may not log in, or not connect: said once, and work goes on when it may
#
# Seen red: without is_unable in src/proc/supervisor.c the log has the server's errors
# at each attempt.  Each submit makes the supervisor try.
$node->append_conf('postgresql.conf', 'redrive.worker_idle_timeout = 0');
$node->reload;
foreach my $case (
	[ 'no login', 'ALTER ROLE app NOLOGIN', 'owner cannot log in', 'ALTER ROLE app LOGIN;' ],
	[ 'no connect', 'REVOKE CONNECT ON DATABASE postgres FROM PUBLIC', 'owner cannot connect', 'GRANT CONNECT ON DATABASE postgres TO app;' ])
{
	my ($label, $command, $fact, $remedy) = @$case;
	# since PostgreSQL 17 such a role can have executors
	if ($label eq 'no login' && $node->safe_psql('postgres', "SELECT current_setting('server_version_num')::int >= 170000") eq 't')
	{
		$node->safe_psql('postgres', "$command; SELECT redrive.submit('work', ARRAY['1', '2']::jsonb[], label => '$label')");
		batch_is($node, $label);
		$node->safe_psql('postgres', $remedy);
		next;
	}
	# one that is about to leave would still run the batch
	ok(poll_until($node, 'SELECT count(*) FROM redrive.workers', '0'), "$label: idle executors leave");
	log_lines();
	hang_free($command, "$label: the command");
	$node->safe_psql('postgres',
		"SELECT redrive.submit('work', ARRAY['1', '2']::jsonb[], label => '$label');
		 SELECT redrive.pause_handler('work'); SELECT redrive.resume_handler('work')");
	$node->safe_psql('postgres', "SELECT redrive.send('work', '1')") foreach (1 .. 10);
	is(remedy($label, $fact), $remedy, "$label: why() tells what to do");
	ok( poll_until($node, "SELECT count(*) FROM redrive.workers", '0'), "$label: no executor");
	my @lines = log_lines();
	is(scalar(grep { /WARNING:  pg_redrive has work of role "app" but cannot start an executor for it/ } @lines), 1, "$label: said once");
	is(scalar(@lines), 1, "$label: ... and nothing else");
	$node->safe_psql('postgres', $remedy);
	batch_is($node, $label);
}

# --- the owner is dropped
#
# Seen red: without require_role in src/flow/segment.c items fail with 42704, for
# current_user is nobody any more.
$node->safe_psql('postgres', 'GRANT CONNECT ON DATABASE postgres TO PUBLIC');
start_batch('owner dropped');
hang_free('BEGIN; REASSIGN OWNED BY app TO postgres; DROP OWNED BY app; DROP ROLE app; COMMIT', 'the owner is dropped');
owner_replaced('owner dropped', 'work');
done_once('owner dropped');

# --- it is dropped while a call runs, which does not notice: nothing is committed that was done for nobody
#
# Seen red: without require_role the batches are finished.
foreach my $case ([ 'quiet', 'item redrive.item', 'SELECT item.*', 'row' ], [ 'quiet_set', 'items redrive.item[]', 'SELECT i.* FROM unnest(items) AS i', 'set' ])
{
	my ($label, $arguments, $items, $kind) = @$case;

	set_gate($node, $label, 0);
	$node->safe_psql('postgres', qq{
CREATE ROLE leaver LOGIN;
SELECT redrive.grant_user('leaver');
CREATE FUNCTION do_$label($arguments) RETURNS void LANGUAGE plpgsql AS \$\$
BEGIN
    PERFORM public.wait_for_gate('$label');
    INSERT INTO public.effects (item, login, role, note) SELECT i.item_no, 'any', 'any', '$label' FROM ($items) AS i;
END \$\$;
SET ROLE leaver;
SELECT redrive.create_handler('do $label', 'do_$label', kind => '$kind', max_retries => 0);
SELECT redrive.submit('do $label', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 20) AS i), label => '$label')});
	ok(poll_until($node, "SELECT count(*) > 0 FROM redrive.workers WHERE handler = 'do $label' AND item_no IS NOT NULL"), "$label: a call runs");
	log_lines();
	hang_free('BEGIN; DROP OWNED BY leaver; DROP ROLE leaver; COMMIT', "$label: the owner is dropped");
	set_gate($node, $label, 1);
	owner_replaced($label, "do $label");
	done_once($label, 20);
}

# --- the extension is updated while workers run: it locks all that they use.  They wait until the library fits again
my ($dir, $version) = split /\|/, $node->safe_psql('postgres', q{
SELECT coalesce(current_setting('extension_destdir', true), '') || (SELECT setting FROM pg_config WHERE name = 'SHAREDIR') || '/extension', extversion
FROM pg_extension WHERE extname = 'pg_redrive'});
$dir = $1 . '/extension' if $node->safe_psql('postgres', "SELECT current_setting('extension_control_path', true)") =~ m{^([^:\$]+)};
my $script = "$dir/pg_redrive--$version--$version.test.sql";
my $back = "$dir/pg_redrive--$version.test--$version.sql";
SKIP:
{
	open(my $file, '>', $script) or skip("cannot write to $dir", 8);
	print $file "ALTER TABLE redrive.batches ADD COLUMN added int;\nALTER TABLE redrive.chunks ADD COLUMN added int;\n"
	  . "ALTER TABLE redrive.failures ADD COLUMN added int;\nALTER TABLE redrive.handlers ADD COLUMN added int;\n";
	close($file);
	append_to_file($back, "ALTER TABLE redrive.batches DROP COLUMN added;\nALTER TABLE redrive.chunks DROP COLUMN added;\n"
		  . "ALTER TABLE redrive.failures DROP COLUMN added;\nALTER TABLE redrive.handlers DROP COLUMN added;\n");
	start_batch('updated');
	hang_free("ALTER EXTENSION pg_redrive UPDATE TO '$version.test'", 'the extension is updated');
	unlink $script;
	is($node->safe_psql('postgres', "SELECT extversion FROM pg_extension WHERE extname = 'pg_redrive'"), "$version.test", '... to the new version');
	hang_free("ALTER EXTENSION pg_redrive UPDATE TO '$version'", '... and back');
	unlink $back;
	done_once('updated');
	log_is_short(4, 'extension updated');
}

# --- databases.  One that is a template or is renamed has its workers back at once
# afterwards, one that was made from a template has workers of its own.
$node->safe_psql('postgres', 'CREATE ROLE app LOGIN; CREATE DATABASE one');
populate('one');
start_batch('template', $many, dbname => 'one');
hang_free('CREATE DATABASE copy TEMPLATE one', 'a database with workers is used as template');
done_once('template', $many, 'one');
done_once('template', $many, 'copy');
start_batch('renamed', $many, dbname => 'one');
hang_free('BEGIN; ALTER DATABASE one RENAME TO uno; ROLLBACK', 'a rename is rolled back');
hang_free('ALTER DATABASE one RENAME TO uno', 'a database with workers is renamed');
done_once('renamed', $many, 'uno');
start_batch('dropped', 5000, dbname => 'uno');
hang_free('DROP DATABASE uno', 'a database is dropped while executors run');
start_batch('forced', 5000, dbname => 'copy');
my ($out, $err) = ('', '');
my $session = IPC::Run::start([ 'psql', '-X', '-d', $node->connstr('copy'), '-c', 'CALL redrive.work(until_idle => false)' ],
	'<', \undef, '>', \$out, '2>', \$err);
hang_free('DROP DATABASE copy WITH (FORCE)', '... and one, with force, while sessions do');
eval { $session->finish };
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'redrive%' AND datname <> 'postgres'", '0'), 'no worker is left in them');
log_is_short(4, 'databases');

# --- the extension is dropped from within a function, and in a transaction that is rolled back
start_batch('rolled back');
hang_free('BEGIN; DROP EXTENSION pg_redrive CASCADE; ROLLBACK', 'DROP EXTENSION is rolled back');
done_once('rolled back');
start_batch('gone', 5000);
hang_free('DO $$ BEGIN DROP EXTENSION pg_redrive CASCADE; END $$', 'DROP EXTENSION in a block');
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'redrive%' AND datname = 'postgres'", '0'), 'workers leave the database');
log_is_short(4, 'extension dropped');

$node->stop;
done_testing();
