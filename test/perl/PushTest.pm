# Helpers of the tests that push: a receiver whose log is the truth.
package PushTest;

use strict;
use warnings;

use Exporter 'import';
use FindBin;
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Time::HiRes qw(time usleep);

our @EXPORT = qw(start_receiver stop_receiver received wait_for_request release wait_for_file platform);

# Start a receiver, with a certificate one that speaks TLS; return { port, dir, process }.  See test/receiver.py.
sub start_receiver
{
	my ($secret, $certificate) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir;
	my $out = "$dir/out";
	my $process = IPC::Run::start([ 'python3', "$FindBin::Bin/../receiver.py", $dir, $secret // '', $certificate // () ], '<', \undef, '>', $out, '2>&1');
	my $end = time() + 30;

	usleep(20_000) until -s "$dir/port" || time() > $end;
	die 'the receiver did not start: ' . slurp_file($out) unless -s "$dir/port";
	return { dir => $dir, port => slurp_file("$dir/port"), process => $process };
}

sub stop_receiver
{
	my ($receiver) = @_;

	$receiver->{process}->kill_kill;
	return;
}

# Return what has arrived, oldest first: all, or at a path, or at those that match.
sub received
{
	my ($receiver, $path) = @_;

	return () unless -e "$receiver->{dir}/requests";
	# only what is asked for is decoded: bodies may be long, and waits ask again and again
	return map { decode_json($_) } grep { /\}$/ && (!defined $path || (/"path": "([^"]*)"/ && (ref $path ? $1 =~ $path : $1 eq $path))) }
	  split /\n/, slurp_file("$receiver->{dir}/requests");
}

# Wait until so many requests have arrived at a path; return whether they did.
sub wait_for_request
{
	my ($receiver, $path, $n) = @_;
	my $end = time() + 60;

	usleep(10_000) until received($receiver, $path) >= $n || time() > $end;
	return received($receiver, $path) >= $n;
}

# Let requests to /held/STATUS/NAME have their answer.
sub release
{
	my ($receiver, $name) = @_;

	append_to_file("$receiver->{dir}/$name", '');
	return;
}

# Wait until there is a file; return whether there is.
sub wait_for_file
{
	my ($file) = @_;
	my $end = time() + 60;

	usleep(10_000) until -e $file || time() > $end;
	return -e $file;
}

# Create a platform that pushes to the receiver.
sub platform
{
	my ($node, $receiver, $name, $path, $more) = @_;

	$node->safe_psql('postgres',
		"SELECT redrive.create_platform('$name', 'http://127.0.0.1:$receiver->{port}$path', allow_http => true, allow_cidr => '{127.0.0.0/8}'"
		  . ($more ? ", $more" : '') . ')');
	return;
}

1;
