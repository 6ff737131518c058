# A platform that is quick has more claimed than it may be sent at a time; that costs nothing when it stops being quick.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use PushTest;
use RedriveTest;
use Test::More;

my $node = new_node('push_prefetch');
my $receiver = start_receiver();

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub count_of { return "SELECT count(*) FROM redrive.push_status WHERE platform = '$_[0]' AND $_[1]"; }

# Record so many tasks, and have the platform pushed what is new of them.
sub start_pushes
{
	my ($platform, $n) = @_;

	sql("SELECT redrive.pause_platform('$platform'); SELECT count(redrive.record_task('$platform ' || n, 'new')) FROM generate_series(1, $n) AS n; TRUNCATE claims_seen");
	sql("SELECT redrive.resume_platform('$platform')");
	return;
}

sub all_delivered
{
	my ($platform, $n) = @_;

	return ok(poll_until($node, count_of($platform, "state = 'delivered'"), $n), "$platform: all is delivered")
	  || diag(sql("SELECT state, error_class, message, count(*) FROM redrive.push_status WHERE platform = '$platform' GROUP BY 1, 2, 3"));
}

sub start_over
{
	sql('SELECT redrive.drop_platform(name) FROM redrive.platforms; DELETE FROM redrive.tasks');
	return;
}

# How large the claims were, which are gone when they are recorded.
sql('CREATE TABLE claims_seen (n int);
	CREATE FUNCTION see_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.claims_seen VALUES (cardinality(NEW.push_ids)); RETURN NULL; END $$;
	CREATE TRIGGER see_claim AFTER INSERT ON redrive.push_claims FOR EACH ROW EXECUTE FUNCTION see_claim()');
my $largest = 'SELECT coalesce(max(n), 0) FROM claims_seen';

# Seen red: without "+ redrive_prefetch_of()" in redrive_room_of() (src/flow/push_result.c), and without has_room() in src/flow/push_send.c.
platform($node, $receiver, 'quick', '/quick', 'max_in_flight => 4');
start_pushes('quick', 2000);
all_delivered('quick', 2000);
cmp_ok(sql($largest), '>', 4, 'more is claimed than may be under way');
my @requests = received($receiver, '/quick');
is(scalar(grep { $_->{under_way} > 4 } @requests), 0, '... and no more than that is ever under way');
my %ids = map { $_->{id} => 1 } @requests;
is(scalar(@requests) . ' ' . keys %ids, '2000 2000', 'each is sent once');

# Where it is not known whether there will be a next answer soon, nothing is prefetched.
#
# Seen red: without the conditions in redrive_prefetch_of() (src/flow/push_result.c).
start_over();
platform($node, $receiver, 'asked', '/json/{"ok":true}', q{max_in_flight => 4, success_when => '$.ok == true'});
start_pushes('asked', 500);
all_delivered('asked', 500);
cmp_ok(sql($largest), '<=', 4, 'none for a platform that success_when judges');
start_over();
platform($node, $receiver, 'rated', '/rated', 'max_in_flight => 4, rate_limit => 1000');
start_pushes('rated', 500);
all_delivered('rated', 500);
cmp_ok(sql($largest), '<=', 4, '... nor for one with a rate');

# It stops to answer: what was prefetched goes back, and costs no retry.
#
# Seen red: without PREFETCHED_US (src/flow/push_send.c); when a push that is given back is due from then on (src/flow/push_record.c).
start_over();
platform($node, $receiver, 'stopping', '/stops/200/stop', 'max_in_flight => 4');
sql("CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS \$\$ BEGIN COPY (SELECT) TO '$receiver->{dir}/stop'; RETURN NULL; END \$\$;
	CREATE TRIGGER stop AFTER INSERT ON redrive.push_claims FOR EACH ROW WHEN (cardinality(NEW.push_ids) > 4) EXECUTE FUNCTION stop()");
foreach my $round (1 .. 3)
{
	my $n = $round * 1500;

	start_pushes('stopping', $n);
	wait_for_file("$receiver->{dir}/stop");
	ok(poll_until($node, count_of('stopping', "state = 'in_flight'"), '4'), 'only what was sent is under way');
	is( sql("SELECT count(*) FILTER (WHERE retry_count > 0) || ' ' || count(*) FILTER (WHERE state = 'pending' AND error_class IS NOT NULL) || ' ' || max(attempts) FROM redrive.push_status WHERE platform = 'stopping'"),
		'0 0 1', '... and the rest waits as before');
	is(sql("SELECT count(*) FROM redrive.pushes AS u JOIN redrive.tasks AS t ON t.task_id = u.task_id WHERE u.state = 'pending' AND u.next_attempt_at <> t.created_at"), '0', '... in its place');
	sql('ALTER TABLE redrive.push_claims DISABLE TRIGGER stop');
	unlink "$receiver->{dir}/stop";
	all_delivered('stopping', $n);
	sql('ALTER TABLE redrive.push_claims ENABLE TRIGGER stop');
	@requests = received($receiver, '/stops/200/stop');
	is(scalar(@requests), $n, 'each was sent once');
	is(scalar(grep { $_->{under_way} > 4 } @requests), 0, 'no more than four at a time');
}
sql('DROP TRIGGER stop ON redrive.push_claims');

# The server is stopped meanwhile: what was not sent costs nothing.
foreach my $round (1 .. 3)
{
	my $n = 4500 + $round * 1500;

	start_pushes('stopping', $n);
	poll_until($node, "SELECT count(*) > 0 FROM claims_seen WHERE n > 4");
	$node->restart;
	is(sql('SELECT count(*) FROM redrive.push_attempts WHERE NOT delivered'), '0', 'nothing is lost by a stop');
	all_delivered('stopping', $n);
}
@requests = received($receiver, '/stops/200/stop');
%ids = map { $_->{id} => 1 } @requests;
is(scalar(@requests) . ' ' . keys %ids, '9000 9000', 'each was sent once');

# It is altered meanwhile: each push is still sent once, and none is lost.
start_pushes('stopping', 12000);
poll_until($node, "SELECT count(*) > 0 FROM claims_seen WHERE n > 4");
sql("SELECT redrive.alter_platform('stopping', url => 'http://127.0.0.1:$receiver->{port}/other')");
all_delivered('stopping', 12000);
is(scalar(received($receiver, '/stops/200/stop')) + scalar(received($receiver, '/other')), 12000, 'each was sent once, to the one or the other');
is(sql("SELECT count(*) FROM redrive.push_attempts WHERE NOT delivered"), '0', 'none failed');

# What is prefetched takes no room of others: a role has seven eighths at most, and what becomes due elsewhere meanwhile is sent.
#
# Seen red: without p->owner->room in has_room() (src/flow/push_send.c); when redrive_next_push() (src/flow/push.c) counts all that was claimed as under way.
start_over();
sql('ALTER SYSTEM SET redrive.push_max_in_flight = 16');
sql('SELECT pg_reload_conf()');
platform($node, $receiver, 'first', '/delay/0.002', 'max_in_flight => 16');
platform($node, $receiver, 'second', '/delay/0.002', 'max_in_flight => 16');
sql("SELECT redrive.pause_platform('first')");
start_pushes('second', 3000);
sql("SELECT redrive.resume_platform('first')");
all_delivered($_, 3000) foreach 'first', 'second';
is(scalar(grep { $_->{under_way} > 14 } received($receiver, '/delay/0.002')), 0, 'two platforms of a role leave an eighth to others');
start_over();
sql("CREATE ROLE neighbour LOGIN; SELECT redrive.grant_user('neighbour')");
sql('ALTER SYSTEM SET redrive.push_max_in_flight = 8');
sql('SELECT pg_reload_conf()');
platform($node, $receiver, 'retried', '/first/5', "max_retries => 9, retry_interval => '300 ms', retry_factor => 1");
sql("UPDATE redrive.platforms SET owner = 'neighbour'; SELECT redrive.pause_platform('retried'); SET SESSION AUTHORIZATION neighbour; SELECT redrive.record_task('a', 'new')");
platform($node, $receiver, 'busy', '/delay/0.003', 'max_in_flight => 4');
start_pushes('busy', 5000);
sql("SELECT redrive.resume_platform('retried')");
all_delivered($_->[0], $_->[1]) foreach [ 'retried', 1 ], [ 'busy', 5000 ];
my @retried = received($receiver, '/first/5');
my @busy = received($receiver, '/delay/0.003');
cmp_ok($retried[-1]{at}, '<', $busy[-1]{at}, 'five retries are sent when they are due, beside a busy platform')
  || diag(sprintf 'they took %.1f s, the other was busy for %.1f s', $retried[-1]{at} - $retried[0]{at}, $busy[-1]{at} - $busy[0]{at});

is(sql('SELECT count(*) FROM redrive.push_claims'), '0', 'no claim is left');
stop_receiver($receiver);
$node->stop;
done_testing();
