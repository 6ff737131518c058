# Documents: every public object is described in docs/reference.md, and every
# SQL block of README.md and docs/ runs as it stands.
use strict;
use warnings;

use FindBin;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('docs');
my ($out, $err) = ('', '');

{
	local %ENV = $node->_get_env();
	IPC::Run::run([ 'bash', "$FindBin::Bin/../../scripts/docs-check" ], '<', \undef, '>', \$out, '2>', \$err);
}

my ($name, $passed, @details);
my $checks = 0;

# one test for each line that says ok or FAILED, with what follows it
sub finish_check
{
	return unless defined $name;
	ok($passed, $name) or diag(join("\n", @details));
	$checks++;
	undef $name;
	return;
}

foreach my $line (split /\n/, $out)
{
	if ($line =~ /^(ok|FAILED) +(.*)/)
	{
		finish_check();
		($name, $passed, @details) = ($2, $1 eq 'ok');
	}
	elsif ($line =~ /^\d+ passed, \d+ failed$/)
	{
		finish_check();
	}
	else
	{
		push @details, $line;
	}
}
cmp_ok($checks, '>=', 3, 'the documents were checked');
is($err, '', 'nothing went wrong besides');

$node->stop;
done_testing();
