# Helpers of the TAP tests: a server with pg_redrive, and waits that survive its restarts.
package RedriveTest;

use strict;
use warnings;

use Exporter 'import';
use IO::Socket::INET;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

our @EXPORT = qw(new_node poll_until query kill_and_wait kill_postmaster wait_for_exit
  create_effects create_await set_gate batch_is verified_ok wait_for_page wait_for_title private_kb);

# Seconds that one wait may take.
my $timeout = $PostgreSQL::Test::Utils::timeout_default // 180;

# Return a started server with pg_redrive and pg_cron preloaded.  Options:
#   conf       more settings, a string of postgresql.conf lines; they win
#   restart_after_crash   default on (the module's own default is off)
#   streaming  true: standbys may follow it
#   extension  create the extension in postgres; default true
#   start      default true
#   initdb     more options of initdb, a list
#   install_path  of another server version, with temp_config, the file that
#              tells where it finds the extension
sub new_node
{
	my ($name, %opt) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name,
		$opt{install_path} ? (install_path => $opt{install_path}) : ());
	my $restart = ($opt{restart_after_crash} // 1) ? 'on' : 'off';

	local $ENV{TEMP_CONFIG} = $opt{temp_config} // $ENV{TEMP_CONFIG};
	$node->init(
		allows_streaming => $opt{streaming} ? 1 : 0,
		extra => [ '--locale=C.UTF-8', '--encoding=UTF8', @{ $opt{initdb} // [] } ]);
	$node->append_conf(
		'postgresql.conf', qq{
shared_preload_libraries = 'pg_cron,pg_redrive'
cron.database_name = 'postgres'
cron.use_background_workers = on
max_worker_processes = 32
max_prepared_transactions = 8
restart_after_crash = $restart
});
	$node->append_conf('postgresql.conf', $opt{conf}) if defined $opt{conf};
	if ($opt{start} // 1)
	{
		$node->start;
		$node->safe_psql('postgres', 'CREATE EXTENSION pg_redrive')
		  if $opt{extension} // 1;
	}
	return $node;
}

# Run one query; return (result, error), the result undef if it failed.
# Unlike safe_psql it never dies, so it may be asked of a server that is
# restarting.
sub query
{
	my ($node, $sql, $dbname) = @_;
	my ($out, $err) = ('', '');
	my $rc = eval {
		$node->psql($dbname // 'postgres', $sql,
			stdout => \$out, stderr => \$err, on_error_stop => 1);
	};

	return (undef, $@) if $@;
	return (undef, $err) if !defined $rc || $rc != 0;
	return ($out, $err);
}

# Return a page, as it comes over HTTP, of a server on this machine that may be about to start; '' if it does not in time.
sub wait_for_page
{
	my ($port, $path) = @_;
	my $end = time() + $timeout;

	do
	{
		if (my $socket = IO::Socket::INET->new(PeerAddr => "127.0.0.1:$port", Timeout => 5))
		{
			local $/;
			print $socket "GET $path HTTP/1.0\r\n\r\n";
			return scalar <$socket>;
		}
		usleep(100_000);
	} while (time() < $end);
	return '';
}

# Wait until the query's result is the one expected (default t); return whether
# it became so in time.  The server may stop and start meanwhile.
sub poll_until
{
	my ($node, $sql, $expected, %opt) = @_;
	my $end = time() + ($opt{timeout} // $timeout);
	my ($out, $err);

	$expected //= 't';
	do
	{
		($out, $err) = query($node, $sql, $opt{dbname});
		return 1 if defined $out && $out eq $expected;
		usleep(50_000);
	} while (time() < $end);

	$out //= '(none)';
	diag("timed out waiting for: $sql\nexpected: $expected\nlast result: $out\nlast error: $err");
	return 0;
}

# Wait until the process is gone; return whether it is.  A zombie counts as gone:
# it holds nothing, and in a container nobody may reap it.
sub wait_for_exit
{
	my ($pid) = @_;
	my $end = time() + $timeout;

	while (kill(0, $pid))
	{
		if (open(my $stat, '<', "/proc/$pid/stat"))
		{
			my $line = <$stat> // '';
			return 1 if $line =~ /^\d+ \(.*\) Z /;
		}
		return 0 if time() > $end;
		usleep(20_000);
	}
	return 1;
}

# Kill -9 the process whose id the query returns, and wait until it is gone.
# Return its id.
sub kill_and_wait
{
	my ($node, $sql) = @_;
	my ($pid, $err) = query($node, $sql);

	die "no process to kill: $sql: " . ($err // '')
	  unless defined $pid && $pid =~ /^\d+$/;
	kill('KILL', $pid) or die "could not kill $pid: $!";
	wait_for_exit($pid) or die "process $pid did not exit";
	return $pid;
}

# Return the ids of the processes that are children of this one.
sub children_of
{
	my ($parent) = @_;
	my @children;

	foreach my $stat (glob('/proc/[0-9]*/stat'))
	{
		open(my $fh, '<', $stat) or next;
		my ($pid, $ppid) = (<$fh> // '') =~ /^(\d+) \(.*\) \S (\d+) /s or next;
		push @children, $pid if $ppid == $parent;
	}
	return @children;
}

# Kill -9 the postmaster, with all its children if wanted (everything => 1), and
# wait until it and its children are gone, so that the node can be started again.
sub kill_postmaster
{
	my ($node, %opt) = @_;
	my $pidfile = $node->data_dir . '/postmaster.pid';
	my ($postmaster) = split /\n/, slurp_file($pidfile);

	# stopped, it starts no child that would not be waited for, and does not see them die
	kill('STOP', $postmaster) or die "could not stop the postmaster $postmaster: $!";
	my $end = time() + $timeout;
	until (slurp_file("/proc/$postmaster/stat") =~ /\) [Tt] /)
	{
		die "the postmaster $postmaster did not stop" if time() > $end;
		usleep(1000);
	}
	my @children = children_of($postmaster) or die "no children of the postmaster $postmaster were found";
	kill('KILL', @children) if $opt{everything};
	$node->kill9;
	foreach my $pid ($postmaster, @children)
	{
		wait_for_exit($pid) or die "process $pid did not exit";
	}

	# a zombie still answers to kill(0), which makes the next start refuse
	unlink $pidfile, $node->host . '/.s.PGSQL.' . $node->port . '.lock';
	return;
}

# Wait until there is a process with such a title; return whether there is.
sub wait_for_title
{
	my ($pattern) = @_;
	my $end = time() + $timeout;

	do
	{
		return 1 if grep { my $file; open($file, '<', $_) && (<$file> // '') =~ $pattern } glob('/proc/[0-9]*/cmdline');
		usleep(10_000);
	} while (time() < $end);
	return 0;
}

# Return the private memory of a process in kB; undef if it is gone, or if this is no
# measure here: without /proc, or with a runtime that keeps what was freed.
sub private_kb
{
	my ($pid) = @_;

	return if ($ENV{LD_PRELOAD} // '') =~ /asan/ || !open(my $status, '<', "/proc/$pid/status");
	my ($kb) = map { /^RssAnon:\s+(\d+)/ ? $1 : () } <$status>;
	return $kb;
}

# Create what handlers of the tests need, in the schema public and usable by
# everybody:
#   effects    one row for each item that was done; without a unique constraint,
#              so that an item done twice shows
#   gates      wait_for_gate(name) returns when the gate is open.  Unlike a lock
#              it stays shut over a crash, and unlike a sleep it ends when the
#              test says so.
sub create_effects
{
	my ($node, $dbname) = @_;

	$node->safe_psql(
		$dbname // 'postgres', q{
CREATE TABLE effects (item int NOT NULL, pid int NOT NULL DEFAULT pg_backend_pid(),
    login name NOT NULL DEFAULT session_user, role name NOT NULL DEFAULT current_user, note text);
CREATE TABLE gates (gate text PRIMARY KEY, open boolean NOT NULL);
CREATE FUNCTION wait_for_gate(name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    WHILE NOT coalesce((SELECT open FROM public.gates WHERE gate = name), true) LOOP
        PERFORM pg_catalog.pg_sleep(0.01);
    END LOOP;
END $$;
GRANT SELECT, INSERT ON effects, gates TO PUBLIC;
});
	return;
}

# Create the procedure await(condition): it returns when the query is true, at most
# some milliseconds later, or after a minute.  For moments that poll_until would miss.
sub create_await
{
	my ($node, $dbname) = @_;

	$node->safe_psql(
		$dbname // 'postgres', q{
CREATE PROCEDURE await(condition text) LANGUAGE plpgsql AS $$
DECLARE
    bound timestamptz := clock_timestamp() + interval '1 min';
    reached boolean := false;
BEGIN
    LOOP
        EXECUTE condition INTO reached;
        EXIT WHEN reached OR clock_timestamp() > bound;
        COMMIT;
        PERFORM pg_catalog.pg_sleep(0.001);
    END LOOP;
END $$;
});
	return;
}

# Open or shut a gate.
sub set_gate
{
	my ($node, $gate, $open, $dbname) = @_;

	$open = $open ? 'true' : 'false';
	$node->safe_psql($dbname // 'postgres',
		"INSERT INTO gates VALUES ('$gate', $open) ON CONFLICT (gate) DO UPDATE SET open = EXCLUDED.open");
	return;
}

# Wait until the batch with this label is in the state (default finished); one
# test.
sub batch_is
{
	my ($node, $label, $state, $dbname) = @_;

	$state //= 'finished';
	return ok( poll_until(
			$node, "SELECT state FROM redrive.batch_progress WHERE label = '$label'",
			$state, dbname => $dbname),
		"batch $label is $state");
}

# All counters of all batches agree with their rows; one test.
sub verified_ok
{
	my ($node, $name, $dbname) = @_;

	return is( $node->safe_psql(
			$dbname // 'postgres',
			"SELECT coalesce(string_agg(format('%s: expected %s, actual %s', check_name, expected, actual), '; '), 'ok') FROM redrive.verify() WHERE NOT ok"
		),
		'ok', "$name: counters verified");
}

1;
