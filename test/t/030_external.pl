# External workers as processes: clients that wait, that are killed with and
# without a claim, and a server that crashes under them.  The truth is in the
# table that the workers write in the transaction of settle() and complete().
#
# Seen red: without redrive_wake_claimers_at_commit() in src/flow/submit.c the
# client that waits does not return in time; without redrive_wake_supervisor_by()
# in src/base/wake.c the lease of the killed client is seen too late for the one
# that waits; without pq_check_connection() in src/flow/lease.c the client that
# was killed while it waited gets an item.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('external', conf => "redrive.max_workers = 2");

create_effects($node);
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION ended(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS $$ INSERT INTO effects (item, note) VALUES (run_no, 'ended') $$;
SELECT redrive.create_handler('work', kind => 'external', retry_delay => '100 ms', on_finish => 'ended');
});

# --- a claim costs the same whatever has been claimed before
# One session, whose plans were made while the tables were empty.  The batches are
# too short for lots (64 claims and more), from which claims go on without a look.
#
# Seen red: with chunks_finished_idx WHERE state = 'done' (sql/20_tables.sql), 200 claims
# read 20 000 entries of it.
$node->safe_psql('postgres',
	"SELECT redrive.create_handler('one by one', kind => 'external');
	 SELECT redrive.submit('one by one', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 50) AS i), label => 'short ' || b)
	 FROM generate_series(1, 4) AS b");
$node->safe_psql('postgres', q{
DO $$
DECLARE
    c record;
BEGIN
    FOR i IN 1 .. 200 LOOP
        SELECT chunk_id, lease_token INTO c FROM redrive.claim('one by one', 1);
        COMMIT;
        PERFORM redrive.complete(c.chunk_id, c.lease_token);
        COMMIT;
    END LOOP;
END $$});
batch_is($node, "short $_") for 1 .. 4;
ok(poll_until($node, "SELECT idx_scan >= 200 FROM pg_stat_user_indexes WHERE indexrelid = 'redrive.chunks_orphaned_idx'::regclass"), 'claims look for chunks');
cmp_ok($node->safe_psql('postgres', "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelid = 'redrive.chunks_finished_idx'::regclass"), '<', 200, '... but not among those that ended');
is($node->safe_psql('postgres', "SELECT coalesce(redrive._next_due((SELECT min(started_at) FROM redrive.batches) - interval '1 min')::text, 'nothing')"), 'nothing', '... and their supervisor sleeps');

# Nor does what the planner expects of functions start parallel workers for one item.
#
# Seen red: without parallel_setup_cost in src/base/spi_call.c two of them start at each settle().
my $log_at = -s $node->logfile;
$node->safe_psql('postgres', q{
LOAD 'auto_explain';
SET auto_explain.log_min_duration = 0;
SET auto_explain.log_nested_statements = on;
SELECT redrive.submit('one by one', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 3) AS i), label => 'settled');
SELECT min(chunk_id) AS chunk, min(lease_token) AS token FROM redrive.claim('one by one', 3) \gset
SELECT redrive.settle(:chunk, :token, ARRAY[(1, 'ok', NULL, NULL, NULL)]::redrive.outcome[]);
SELECT redrive.complete(:chunk, :token, ARRAY[(2, 'ignored', NULL, NULL, NULL)]::redrive.outcome[]);
});
my $plans = slurp_file($node->logfile, $log_at);
like($plans, qr/_open_items/, 'plans of a settlement are seen');
unlike($plans, qr/Workers Planned/, '... and have no workers');
batch_is($node, 'settled');

# Start a client; what it prints goes to the returned hash.
sub client
{
	my ($sql, $of) = @_;
	my %client = (out => '', err => '', node => $of // $node);

	$client{run} = IPC::Run::start(
		[ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $client{node}->connstr('postgres'), map { ('-c', $_) } @$sql ],
		'<' => \undef, '>' => \$client{out}, '2>' => \$client{err},
		IPC::Run::timer($PostgreSQL::Test::Utils::timeout_default));
	return \%client;
}

# Start a client that waits for an item, and see that it does.
sub client_waits
{
	my ($name) = @_;
	my $client = client(
		["/* $name */ SELECT string_agg(payload::text, ' ' ORDER BY item_no), max(chunk_id), max(lease_token) FROM redrive.claim('work', worker => '$name', wait => '1 min')"]);

	ok( poll_until(
			$node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '/* $name */%' AND wait_event_type = 'Extension'", '1'),
		"client $name waits");
	return $client;
}

# Wait for the end of a client, much shorter than it would wait; return its rows.
sub rows_of
{
	my ($client) = @_;

	IPC::Run::pump_nb($client->{run});
	my $done = poll_until($client->{node}, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%redrive.claim(%' AND pid <> pg_backend_pid()",
		'0', timeout => 25);
	if ($done) { $client->{run}->finish } else { $client->{run}->kill_kill }
	return $done ? $client->{out} : 'still waiting';
}

sub submit
{
	my ($label, $from, $to) = @_;
	$node->safe_psql('postgres',
		"SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series($from, $to) AS i), ARRAY(SELECT i::text FROM generate_series($from, $to) AS i), label => '$label')");
	return;
}

sub complete
{
	my ($chunk, $token) = @_;
	return $node->safe_psql('postgres', "SELECT redrive.complete($chunk, $token)");
}

# --- who waits is woken by a commit, and by nothing else
my $waits = client_waits('first');
my $session = $node->background_psql('postgres');
$session->query_safe("BEGIN; SELECT redrive.submit('work', ARRAY['1', '2']::jsonb[], label => 'woken')");
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '/* first */%' AND wait_event_type = 'Extension'", '1'), 'it waits on before the commit');
$session->query_safe('COMMIT');
my ($items, $chunk, $token) = split /\|/, rows_of($waits);
is($items, '1 2', 'the commit wakes it');
complete($chunk, $token);
batch_is($node, 'woken');
ok(poll_until($node, "SELECT count(*) FROM effects WHERE note = 'ended'", '1'), 'an executor calls on_finish');

# --- the same with items that become due while it waits: retries and delayed ones
$waits = client_waits('second');
# all in one transaction, so that it gets no item before
$session->query_safe("BEGIN; SELECT redrive.submit('work', ARRAY['3', '4']::jsonb[], ARRAY['3', '4'], label => 'again');
	SELECT redrive.complete(c.chunk_id, c.lease_token, ARRAY[ROW(1, 'retry', 'again', NULL, '1 s')::redrive.outcome]) FROM redrive.claim('work') AS c WHERE c.item_no = 1; COMMIT");
($items, $chunk, $token) = split /\|/, rows_of($waits);
is($items, '3', 'a retry that becomes due ends the wait');
complete($chunk, $token);
batch_is($node, 'again');
$waits = client_waits('third');
$session->query_safe("SELECT redrive.send('work', '5', delay => '1 s')");
($items, $chunk, $token) = split /\|/, rows_of($waits);
is($items, '5', 'so does an item that was sent with a delay while it waited');
complete($chunk, $token);

# --- the same after COMMIT PREPARED, which may come from another session
#
# Seen red: without redrive_wake_prepared() in src/proc/utility.c both take up to a minute.
$waits = client_waits('two-phase');
$node->safe_psql('postgres', "BEGIN; SELECT redrive.submit('work', ARRAY['6']::jsonb[], label => 'two-phase'); PREPARE TRANSACTION 'submit'");
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '/* two-phase */%' AND wait_event_type = 'Extension'", '1'), 'it waits on after PREPARE TRANSACTION');
$node->safe_psql('postgres', "COMMIT PREPARED 'submit'");
($items, $chunk, $token) = split /\|/, rows_of($waits);
is($items, '6', 'COMMIT PREPARED ends the wait');
$node->safe_psql('postgres', "BEGIN; SELECT redrive.complete($chunk, $token); PREPARE TRANSACTION 'complete'");
$node->safe_psql('postgres', "COMMIT PREPARED 'complete'");
ok(poll_until($node, "SELECT state FROM redrive.batch_progress WHERE label = 'two-phase'", 'finished', timeout => 15), '... and the batch, when it ended a claim');

# --- redrive.enabled = off: nothing is claimed, and what was claimed is ended
#
# Seen red: with h.paused alone in redrive._claim_external the second one is claimed.
$node->safe_psql('postgres', "SELECT redrive.submit('work', ARRAY['7', '8']::jsonb[], label => 'off')");
my $claim = "SELECT payload, chunk_id, lease_token FROM redrive.claim('work', 1)";
($items, $chunk, $token) = split /\|/, $node->safe_psql('postgres', $claim);
is($items, '7', 'one is claimed');
$node->append_conf('postgresql.conf', 'redrive.enabled = off');
$node->reload;
ok(poll_until($node, 'SHOW redrive.enabled', 'off'), 'switched off');
is($node->safe_psql('postgres', $claim), '', 'nothing is claimed then');
complete($chunk, $token);
is($node->safe_psql('postgres', "SELECT b.succeeded, w.fact FROM redrive.batch_progress AS b CROSS JOIN LATERAL redrive.why(b.batch_id) AS w WHERE b.label = 'off'"),
	'1|redrive.enabled is off', '... but a claim is ended, and why() says what is wrong');
$node->append_conf('postgresql.conf', 'redrive.enabled = on');
$node->reload;
ok(poll_until($node, 'SHOW redrive.enabled', 'on'), 'switched on');
($items, $chunk, $token) = split /\|/, $node->safe_psql('postgres', $claim);
is($items, '8', 'the next one is claimed');
complete($chunk, $token);
batch_is($node, 'off');

# --- the supervisor, which folds what was ended, has the batch locked for a moment: nobody is told to end it
#
# Seen red: without NOT EXISTS in redrive._changed_by() it is "blocked by a lock".
$node->safe_psql('postgres', "SELECT redrive.submit('work', ARRAY['9', '9']::jsonb[], label => 'folded')");
($items, $chunk, $token) = split /\|/, $node->safe_psql('postgres', $claim);
$session->query_safe(q{
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_xact_lock_shared(9); RETURN NEW; END';
CREATE TRIGGER hold BEFORE UPDATE ON redrive.batches FOR EACH ROW EXECUTE FUNCTION hold();
SELECT pg_advisory_lock(9)});
complete($chunk, $token);
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'redrive supervisor' AND wait_event = 'advisory'", '1'), 'the supervisor folds');
is($node->safe_psql('postgres', "SELECT w.fact FROM redrive.batch_progress AS b CROSS JOIN LATERAL redrive.why(b.batch_id) AS w WHERE b.label = 'folded'"),
	'not claimed', '... which is not in the way');
$session->query_safe('SELECT pg_advisory_unlock(9); DROP TRIGGER hold ON redrive.batches; DROP FUNCTION hold');
($items, $chunk, $token) = split /\|/, $node->safe_psql('postgres', $claim);
complete($chunk, $token);
batch_is($node, 'folded');

# --- a client that is killed while it waits gets nothing
$waits = client_waits('dead');
$waits->{run}->kill_kill(grace => 0);
submit('not for the dead', 10, 11);
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '/* dead */%'", '0'), 'its server process ends');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.workers WHERE worker = \'dead\''), '0', 'and has claimed nothing');
is($node->safe_psql('postgres', "SELECT pending FROM redrive.batch_progress WHERE label = 'not for the dead'"), '2', 'its items are there for others');

# --- a client that is killed with a claim: half of it settled, some more written
# but not committed.  When the lease ends another gets the rest, at no cost.
my $dies = client(
	[
		"CREATE TEMP TABLE c AS SELECT * FROM redrive.claim('work', worker => 'dies')",
		"BEGIN; INSERT INTO effects (item) VALUES (11); SELECT redrive.settle(max(chunk_id), max(lease_token), ARRAY[ROW(2, 'ok', NULL, NULL, NULL)::redrive.outcome]) FROM c; COMMIT",
		"BEGIN",
		"INSERT INTO effects (item) VALUES (10)",
		"/* dies */ SELECT pg_sleep(1000) -- slow handler"
	]);
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '/* dies */%'", '1'), 'a client works on a claim');
$waits = client_waits('heir');
$dies->{run}->kill_kill(grace => 0);
# its lease, which ends while the other one waits, however slow we are
$node->safe_psql('postgres', "SELECT redrive.heartbeat(chunk_id, lease_token, '100 ms') FROM redrive.chunks WHERE worker = 'dies' AND state = 'running'");
($items, $chunk, $token) = split /\|/, rows_of($waits);
is($items, '10', 'the rest is claimed by another when the lease ends, without any pass');
is($node->safe_psql('postgres', "SELECT rescue_count FROM redrive.chunks WHERE chunk_id = $chunk"), '1', 'the loss is counted');
verified_ok($node, 'after the loss');
$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '/* dies */%'");
$session->query_safe("BEGIN; INSERT INTO effects (item) VALUES (10); SELECT redrive.complete($chunk, $token); COMMIT");
batch_is($node, 'not for the dead');
is($node->safe_psql('postgres', 'SELECT item, count(*) FROM effects WHERE item IN (10, 11) GROUP BY item ORDER BY item'), "10|1\n11|1", 'each item is done once');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.locks'), '0', 'all keys are unlocked');

# --- the server crashes while a worker settles: the claim is kept, what was not
# committed is gone, and the worker goes on with its token
submit('crash', 20, 21);
$session->query_safe("CREATE TABLE mine AS SELECT * FROM redrive.claim('work', worker => 'survivor')");
$session->quit;
$dies = client(
	[
		"BEGIN",
		"INSERT INTO effects (item) SELECT payload::int FROM mine",
		"SELECT redrive.complete(max(chunk_id), max(lease_token)) FROM mine",
		"/* crash */ SELECT pg_sleep(1000) -- slow handler"
	]);
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '/* crash */%'", '1'), 'a client has completed and not committed');
kill_and_wait($node, "SELECT pid FROM pg_stat_activity WHERE query LIKE '/* crash */%'");
$dies->{run}->finish;
ok(poll_until($node, "SELECT count(*) FROM redrive.workers WHERE worker = 'survivor'", '1'), 'after the restart its claim is there');
is($node->safe_psql('postgres', 'SELECT count(*) FROM effects WHERE item >= 20'), '0', 'and its effects are not');
verified_ok($node, 'after the crash');
$node->safe_psql('postgres',
	"BEGIN; INSERT INTO effects (item) SELECT payload::int FROM mine; SELECT redrive.complete(max(chunk_id), max(lease_token)) FROM mine; COMMIT");
batch_is($node, 'crash');
is($node->safe_psql('postgres', 'SELECT count(*), count(DISTINCT item) FROM effects WHERE item >= 20'), '2|2', 'each item is done once');

# --- NOTIFY for those who cannot wait
$session = $node->background_psql('postgres');
$session->query_safe("SELECT redrive.alter_handler('work', notify => true)");
$session->query_safe('LISTEN redrive_work');
submit('notified', 30, 30);
my $told = '';
foreach my $i (1 .. 100)
{
	$told .= $session->query_safe('SELECT 1');
	last if $told =~ /Asynchronous notification "redrive_work"/;
}
like($told, qr/Asynchronous notification "redrive_work" received/, 'a listener is told');
$session->quit;

# --- the end of a batch is written down at once, whichever worker commits last, and although somebody had locked it
#
# Seen red: with the fold left to the next claim while the batch has more to claim (flow/settle.c), and with the wish to fold
# dropped when the batch is locked (proc/external.c), it takes until the supervisor's next look.
$node->safe_psql('postgres', "SELECT redrive.create_handler('ending', kind => 'external')");
my $claim_one = "SELECT chunk_id, lease_token FROM redrive.claim('ending', 1)";
my $end = "SELECT state FROM redrive.batch_progress WHERE label =";

# Have a client do something in a transaction that stays open until gate "end" opens.
sub stays_open
{
	my ($sql) = @_;

	set_gate($node, 'end', 0);
	my $client = client(["/* open */ BEGIN; $sql; SELECT wait_for_gate('end'); COMMIT"]);
	ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '/* open */%' AND wait_event = 'PgSleep'", '1'), 'a transaction is open');
	return $client;
}
$node->safe_psql('postgres', "SELECT redrive.submit('ending', ARRAY['1', '2']::jsonb[], label => 'two')");
my ($ending_chunk, $ending_token) = split /\|/, $node->safe_psql('postgres', $claim_one);
my $open = stays_open("SELECT redrive.complete($ending_chunk, $ending_token)");
$node->safe_psql('postgres', "SELECT redrive.complete(c.chunk_id, c.lease_token) FROM ($claim_one) AS c");
ok(poll_until($node, "SELECT bool_and(c.folded) FROM redrive.chunks AS c JOIN redrive.batches AS b USING (batch_id) WHERE b.label = 'two' AND c.state = 'done'"), 'the supervisor has looked');
set_gate($node, 'end', 1);
ok(poll_until($node, "$end 'two'", 'finished', timeout => 10), 'the last commit ends a batch');
IPC::Run::finish($open->{run});

$node->safe_psql('postgres', "SELECT redrive.submit('ending', ARRAY['1']::jsonb[], label => 'locked')");
($ending_chunk, $ending_token) = split /\|/, $node->safe_psql('postgres', $claim_one);
$open = stays_open("SELECT batch_id FROM redrive.batches WHERE label = 'locked' FOR UPDATE");
$node->safe_psql('postgres', "SET statement_timeout = '20 s'; SELECT redrive.complete($ending_chunk, $ending_token)");
$node->safe_psql('postgres', "SELECT redrive.submit('ending', ARRAY['1']::jsonb[], label => 'another')");
$node->safe_psql('postgres', "SELECT redrive.complete(c.chunk_id, c.lease_token) FROM ($claim_one) AS c");
ok(poll_until($node, "$end 'another'", 'finished', timeout => 10), 'while a batch is locked others end');
set_gate($node, 'end', 1);
ok(poll_until($node, "$end 'locked'", 'finished', timeout => 10), '... and it ends when it is free');
IPC::Run::finish($open->{run});

# --- several claim of one batch, item by item, from lots; the server crashes under them, and then they go on.  What was claimed
# comes back by its lease, what is left of a lot by itself.
$node->safe_psql('postgres', "SELECT redrive.create_handler('many', kind => 'external'); SELECT redrive.submit('many', ARRAY(SELECT to_jsonb(i) FROM generate_series(1000, 2999) AS i), label => 'many')");

# Start clients that claim, do and complete one item after the other until the batch has ended; the second half of the items when gate "many" is open.
sub start_many
{
	my ($n) = @_;
	return map {
		client([q{/* many */ DO $$
DECLARE
    c record;
BEGIN
    WHILE EXISTS (SELECT FROM redrive.batch_progress WHERE label = 'many' AND state <> 'finished') LOOP
        SELECT x.chunk_id, x.lease_token, x.payload INTO c FROM redrive.claim('many', 1, lease => '5 s', wait => '200 ms') AS x;
        COMMIT;
        IF c.chunk_id IS NOT NULL THEN
            PERFORM wait_for_gate('many') WHERE c.payload::int >= 2000;
            INSERT INTO effects (item) VALUES (c.payload::int);
            PERFORM redrive.complete(c.chunk_id, c.lease_token);
            COMMIT;
        END IF;
    END LOOP;
END $$}])
	} 1 .. $n;
}
$open = stays_open("SELECT batch_id FROM redrive.batches WHERE label = 'many' FOR UPDATE");
set_gate($node, 'many', 0);
my @many = start_many(3);
ok(poll_until($node, "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE '/* many */%' AND wait_event_type = 'Lock'"), 'clients wait for the row of a batch');
set_gate($node, 'end', 1);
ok(poll_until($node, "SELECT count(*) > 0 FROM redrive.chunks AS c JOIN redrive.batches AS b USING (batch_id) WHERE b.label = 'many' AND c.state = 'orphaned'"), '... and then set lots aside');
IPC::Run::finish($open->{run});
kill_and_wait($node, "SELECT pid FROM pg_stat_activity WHERE query LIKE '/* many */%' LIMIT 1");
IPC::Run::finish($_->{run}) foreach @many;
ok(poll_until($node, "SELECT count(*) FROM redrive.batch_progress WHERE label = 'many' AND pending > 0", '1'), 'after the restart there is something left');
verified_ok($node, 'after a crash with lots');
set_gate($node, 'many', 1);
@many = start_many(3);
batch_is($node, 'many');
IPC::Run::finish($_->{run}) foreach @many;
is($node->safe_psql('postgres', 'SELECT count(*), count(DISTINCT item) FROM effects WHERE item >= 1000'), '2000|2000', 'each item is done once');

verified_ok($node, 'at the end');
$node->stop;

# --- without preload: claims look by themselves, take back what is lost and write down the end

my $bare = new_node('bare', conf => "shared_preload_libraries = ''");
$bare->safe_psql('postgres', "SELECT redrive.create_handler('work', kind => 'external')");
$waits = client(["/* bare */ SELECT string_agg(item_no::text, ' ' ORDER BY item_no), max(chunk_id), max(lease_token) FROM redrive.claim('work', lease => '1 ms', wait => '1 min')"], $bare);
ok(poll_until($bare, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '/* bare */%' AND wait_event_type = 'Extension'", '1'), 'a client waits');
my $err;
$bare->psql('postgres', "SELECT redrive.submit('work', ARRAY['1', '2', '3']::jsonb[], label => 'bare')", stderr => \$err);
is($err, '', 'submit() does not complain of missing workers');
($items, $chunk, $token) = split /\|/, rows_of($waits);
is($items, '1 2 3', 'it sees what is committed');
ok(poll_until($bare, "SELECT count(*) FROM redrive.claim('work', 3)", '1'), 'the claim is taken back when its lease has ended, and parted');
$bare->safe_psql('postgres', 'SELECT redrive.complete(chunk_id, lease_token) FROM redrive.chunks WHERE state = \'running\'');
ok(poll_until($bare, "SELECT redrive.complete(c.chunk_id, c.lease_token) IS NULL FROM (SELECT DISTINCT chunk_id, lease_token FROM redrive.claim('work', wait => '10 ms')) AS c; SELECT state FROM redrive.batch_progress", 'finished'),
	'the rest is claimed and the end written down');
is($bare->safe_psql('postgres', "SELECT batch_id FROM redrive.batch_progress \\gset\nCALL redrive.wait(:batch_id)"), 'finished', 'wait() takes it for done');
verified_ok($bare, 'without preload', 'postgres');
$bare->stop;

done_testing();
