/*
 * getaddrinfo() that looks for names with "hanging" in them as long as there is the file SLOW_LOOKUP; for tests, by LD_PRELOAD.
 * Makes SLOW_LOOKUP.begun and SLOW_LOOKUP.ended.  After a minute it gives up.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int (*Lookup) (const char *, const char *, const struct addrinfo *, struct addrinfo **);

static void
note(const char *file, const char *what)
{
	char		path[1000];

	snprintf(path, sizeof(path), "%s.%s", file, what);
	close(open(path, O_CREAT | O_WRONLY, 0666));
}

int
getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result)
{
	const char *file = getenv("SLOW_LOOKUP");

	if (node == NULL || file == NULL || strstr(node, "hanging") == NULL)
		return ((Lookup) dlsym(RTLD_NEXT, "getaddrinfo")) (node, service, hints, result);
	note(file, "begun");
	for (int i = 0; i < 6000 && access(file, F_OK) == 0; i++)
		usleep(10000);			/* -- slow handler */
	note(file, "ended");
	return EAI_AGAIN;
}
